"""What the state machines over stored rows share: new tokens, whatever the rows lie in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

PAGE = 16
SETTINGS = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class StoredRows(RuleBasedStateMachine):
    """The model is a list of lists: the value of each token of each row, which K and V hold, too.

    Layer l stores value + l / 10 in K and its negative in V, so that rows, tokens, layers, K and V cannot be mixed up.
    kv: a `RowStore` with a pool. layers: those that store there.
    """

    def __init__(self, kv: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.kv, self.layers = kv, layers
        self.model: list[list[float]] = []
        self.next_value = 1.0

    def slots(self, step: Any, layer: int) -> list[list[int]]:
        """Where a layer's new tokens go."""
        return step.slots  # type: ignore[no-any-return]

    def written(self, values: torch.Tensor, layer: int) -> torch.Tensor:
        """[tokens, 2, 4]: what K of a layer holds for these values."""
        return (values + layer / 10)[:, None, None].expand(-1, 2, 4)

    def write(self, counts: list[int]) -> tuple[Any, list[list[float]]]:
        """Begins a step and stores new values for it; returns the step and the values."""
        step = self.kv.begin(counts)
        values = []
        for count in counts:
            values.append([self.next_value + index for index in range(count)])
            self.next_value += count
        flat = torch.tensor([value for row in values for value in row])
        for layer in self.layers:
            slots = torch.tensor([slot for row in self.slots(step, layer) for slot in row], dtype=torch.long)
            assert len(set(slots.tolist())) == len(slots) == len(flat), "two tokens share a slot"
            content = self.written(flat, layer)
            k, v = self.kv.pool.ensure_layer(layer, content.permute(1, 0, 2))
            k[slots // PAGE, slots % PAGE] = content
            v[slots // PAGE, slots % PAGE] = -content
        return step, values

    def step(self, counts: list[int]) -> None:
        step, values = self.write(counts)
        assert step.past == [len(row) for row in self.model]
        assert step.lengths == [len(row) + count for row, count in zip(self.model, counts, strict=True)]
        self.kv.commit(step.lengths)
        for row, new in zip(self.model, values, strict=True):
            row += new

    @precondition(lambda self: not self.model)
    @rule(counts=st.lists(st.integers(0, 70), min_size=1, max_size=4))
    def first_step(self, counts: list[int]) -> None:
        self.model = [[] for _ in counts]
        self.step(counts)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def next_step(self, data: st.DataObject) -> None:
        size = len(self.model)
        self.step(data.draw(st.lists(st.integers(0, 40), min_size=size, max_size=size)))

    @precondition(lambda self: self.model)
    @rule()
    def decode(self) -> None:
        self.step([1] * len(self.model))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def step_that_fails(self, data: st.DataObject) -> None:
        """Begun and stored, but never committed."""
        size = len(self.model)
        self.write(data.draw(st.lists(st.integers(0, 40), min_size=size, max_size=size)))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rearrange(self, data: st.DataObject) -> None:
        """Beams: rows doubled, dropped, in any order."""
        choice = st.integers(0, len(self.model) - 1)
        indices = data.draw(st.lists(choice, min_size=1, max_size=5))
        self.kv.rearrange(indices)
        self.model = [list(self.model[index]) for index in indices]
        self.rearranged(indices)

    def rearranged(self, indices: list[int]) -> None:
        """What else the model has of rows."""

    @precondition(lambda self: self.model)
    @rule()
    def unshare(self) -> None:
        self.kv.unshare()
        self.unshared()

    def unshared(self) -> None:
        """What holds then."""
