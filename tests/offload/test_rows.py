"""Rows in host memory under random lives, against rows kept as plain lists and attended to by one softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltakv.errors import OffloadError
from deltakv.offload import attention, memory
from deltakv.offload.config import Host
from deltakv.offload.lanes import Lanes, lanes_of
from deltakv.offload.planner import FixedShare
from deltakv.offload.rows import HostRows
from deltakv.offload.scheduler import Schedule
from offload.delays import late_lanes, late_store, refusing

LAYERS, HEADS, KV, DIM, HIDDEN = (0, 2), 4, 2, 4, 12
WEIGHTS = torch.randn(2, HIDDEN, KV * DIM, generator=torch.Generator().manual_seed(7))


def project(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """K, which depends on the position, and V of X: [..., hidden] to [..., kv_heads, head_dim]."""
    k, v = ((x @ weight).unflatten(-1, (KV, DIM)) for weight in WEIGHTS)
    return k * torch.cos(positions[..., None, None] * 0.1), v


class Reference:
    """Each row a list of what its tokens' K and V are, by layer."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[dict[int, tuple[Tensor, Tensor]]]] = [[] for _ in range(rows)]

    def attend(self, row: int, layer: int, query: Tensor, new: list[dict[int, Any]]) -> Tensor:
        """query: [heads, head_dim], of the last of `new`."""
        k, v = (torch.stack([t[layer][part] for t in self.rows[row] + new]) for part in (0, 1))
        logits = torch.einsum("hd,thd->ht", query, k.repeat_interleave(HEADS // KV, 1)) * 0.5
        return torch.einsum("ht,thd->hd", logits.softmax(-1), v.repeat_interleave(HEADS // KV, 1))


class Life:
    """One batch from its prompt on. data: hypothesis's choices."""

    def __init__(self, data: Any, make: Callable[[torch.device, bool], Lanes]) -> None:
        self.draw = data.draw
        share, schedule = self.draw(st.sampled_from([0.0, 0.4, 1.0])), self.draw(st.sampled_from(Schedule))
        host = Host(chunk_mib=self.draw(st.sampled_from([300, 1000])) / (1 << 20), chunks=self.draw(st.integers(2, 4)))
        self.rows = HostRows(LAYERS, 16, host, FixedShare(share, schedule), make_lanes=make)
        self.reference = Reference(self.draw(st.integers(1, 3)))
        self.seed = 0
        if self.draw(st.booleans()):
            self.reserve()

    def step(self, *, fails: bool = False) -> None:
        """New tokens in columns, each row's together, padding before or behind; nothing counts if it fails."""
        batch, width = len(self.reference.rows), self.draw(st.integers(1, 6))
        real = torch.zeros(batch, width, dtype=torch.bool)
        for row in range(batch):
            first = self.draw(st.integers(0, width - 1))
            real[row, first : self.draw(st.integers(first, width))] = True
        append = self.rows.begin(real.sum(1).tolist())
        assert append.past == [len(row) for row in self.reference.rows]
        positions = torch.tensor(append.past)[:, None] + real.long().cumsum(1) - 1
        new: list[list[dict[int, Any]]] = [[{} for _ in range(int(real[row].sum()))] for row in range(batch)]
        for layer in LAYERS:
            self.seed += 1
            made = torch.Generator().manual_seed(self.seed)
            x, query = (torch.randn(batch, width, size, generator=made) for size in (HIDDEN, HEADS * DIM))
            k, v = project(x, positions)
            query = query.view(batch, width, HEADS, DIM)
            inputs = (x, positions) if self.rows.keeps_inputs(layer) else None
            kv = (k.transpose(1, 2), v.transpose(1, 2))
            self.rows.store(layer, *kv, inputs, real)
            out = self.rows.attend(layer, query.transpose(1, 2), *kv, real, 0.5, None, project)
            for row in range(batch):
                for number, column in enumerate(real[row].nonzero().flatten().tolist()):
                    new[row][number][layer] = (k[row, column], v[row, column])
                    expected = self.reference.attend(row, layer, query[row, column], new[row][: number + 1])
                    torch.testing.assert_close(out[row, column], expected, atol=1e-4, rtol=1e-4)
            if fails:
                return
        self.rows.commit(append.lengths)
        for tokens, more in zip(self.reference.rows, new, strict=True):
            tokens += more

    def reserve(self) -> None:
        self.rows.reserve(self.draw(st.integers(1, 40)))

    def truncate(self) -> None:
        lengths = [self.draw(st.integers(0, len(row) + 1)) for row in self.reference.rows]
        self.rows.truncate(lengths)
        self.reference.rows = [row[:length] for row, length in zip(self.reference.rows, lengths, strict=True)]

    def rearrange(self) -> None:
        batch = len(self.reference.rows)
        indices = self.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
        try:
            with refusing(self.draw(st.integers(0, 20))):
                self.rows.rearrange(indices)
        except OffloadError:
            return  # all is as it was
        self.reference.rows = [list(self.reference.rows[index]) for index in indices]

    def clear(self) -> None:
        self.rows.clear()
        self.reference = Reference(self.draw(st.integers(1, 3)))
        self.step()  # until then not even the batch size is decided


@pytest.mark.parametrize("lanes", [lanes_of, late_lanes, late_store], ids=["at once", "late", "late store"])
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_lives(lanes: Callable[[torch.device, bool], Lanes], data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLAB_BYTES", 1 << 11)
    monkeypatch.setattr(memory, "LEAST_SLAB_BYTES", 1 << 9)
    monkeypatch.setattr(attention, "_LOGITS", 64)
    life = Life(data, lanes)
    life.step()
    actions = ["step"] * 5 + ["fail", "reserve", "truncate", "rearrange", "clear"]
    for action in data.draw(st.lists(st.sampled_from(actions), max_size=10)):
        if action == "step":
            life.step()
        elif action == "fail":
            life.step(fails=True)
        else:
            getattr(life, action)()
    life.step()
