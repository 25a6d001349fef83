"""Evaluation mode: one forward over several tokens in which each position picks for itself.

The K and V of a position depend on its own hidden state alone, so a forward over m teacher-forced tokens in which
every position attends as it would have if decoded gives what m decode steps give. The positions are the rows that
a method's selector sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltakv.methods import Selector, SoftmaxStats
from deltakv.ops import chunk_attention, chunk_logits
from deltakv.plan import Role

#: Positions whose logits are held at once: 64 of 32 heads over 32k tokens are 256 MB.
BLOCK = 64


@dataclass
class Trace:
    """What evaluation mode saw.

    picks: for each SELECT layer one int tensor a position, its logical pages (all of them for a dense row); filled
        if `positions(picks=True)`.
    recall: for each REUSE layer the mass of full attention inside the pick, mean over heads and positions; filled
        if `positions(recall=True)`. A dense row's pick holds all of it; the mass of learned sinks does not count.
    """

    picks: dict[int, list[Tensor]] = field(default_factory=dict)
    recall: dict[int, float] = field(default_factory=dict)


@dataclass
class _Seen:
    """What one forward has seen so far. kept_tokens: by SELECT layer, the tokens of each position's pick, by block;
    recall: by REUSE layer, the sum over heads and positions, and how many they are."""

    kept_tokens: dict[int, list[Tensor]] = field(default_factory=dict)
    picks: dict[int, list[Tensor]] = field(default_factory=dict)
    recall: dict[int, tuple[float, int]] = field(default_factory=dict)


class Positions:
    """Carries out evaluation mode for one `with handle.positions()` block."""

    def __init__(self, selector: Selector, page_size: int, *, picks: bool, recall: bool) -> None:
        self.trace = Trace()
        self._selector = selector
        self._page_size = page_size
        self._want_picks, self._want_recall = picks, recall
        self._kept: dict[int, Tensor] = {}
        self._recall: dict[int, tuple[float, int]] = {}
        self._step = _Seen()

    def commit(self) -> list[Tensor]:
        """The forward came through: what it saw counts. Returns the tokens that each position's REUSE layers attended
        to, one int32 [positions] a SELECT layer, in order."""
        step, self._step = self._step, _Seen()
        for layer, picks in step.picks.items():
            self.trace.picks.setdefault(layer, []).extend(picks)
        for layer, (mass, count) in step.recall.items():
            old_mass, old_count = self._recall.get(layer, (0.0, 0))
            self._recall[layer] = (old_mass + mass, old_count + count)
            self.trace.recall[layer] = self._recall[layer][0] / self._recall[layer][1]
        return [torch.cat(step.kept_tokens[layer]) for layer in sorted(step.kept_tokens)]

    def abort(self) -> None:
        """The forward failed: forgets what it saw."""
        self._step = _Seen()

    def attend(
        self,
        row: int,
        layer: int,
        role: Role,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """q [m, n_heads, head_dim] are the last m of T positions of a row; k, v [T, n_kv_heads, head_dim]."""
        kept = None
        if role is Role.SELECT:
            self._kept[row] = self._pick(layer, q, k, scale, sinks)
        elif role is Role.REUSE:
            kept = self._kept[row].to(q.device)
            if self._want_recall:
                self._add_recall(layer, q, k, scale, sinks, kept)
        return chunk_attention(q, k, v, scale, sinks, kept, self._page_size)

    def _pick(self, layer: int, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        """bool [m, n_pages]: the pages that each position keeps."""
        m, tokens = len(q), len(k)
        width = -(-tokens // self._page_size)
        kept = torch.zeros((m, width), dtype=torch.bool, device=q.device)
        for start in range(0, m, BLOCK):
            stop = min(start + BLOCK, m)
            end = tokens - m + stop
            logits, lse = chunk_logits(q[start:stop], k[:end], scale, sinks, self._page_size)
            seq_lens = torch.arange(end - (stop - start) + 1, end + 1, dtype=torch.int32, device=q.device)
            stats = SoftmaxStats(logits[:, None], torch.zeros_like(lse)[:, None], lse, seq_lens, self._page_size)
            picks = self._selector.pick(stats)
            column = torch.arange(picks.pages.shape[1], device=q.device)
            listed = column < picks.n_kept[:, None]
            rows = torch.arange(start, stop, device=q.device)[:, None].expand_as(listed)
            kept[rows[listed], picks.pages.long()[listed]] = True
            missing = -seq_lens % self._page_size
            self._step.kept_tokens.setdefault(layer, []).append(picks.n_kept * self._page_size - missing)
        if self._want_picks:
            self._step.picks.setdefault(layer, []).extend(row.nonzero().flatten().cpu() for row in kept)
        return kept

    def _add_recall(self, layer: int, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None, kept: Tensor) -> None:
        m, tokens = len(q), len(k)
        for start in range(0, m, BLOCK):
            stop = min(start + BLOCK, m)
            end = tokens - m + stop
            logits, lse = chunk_logits(q[start:stop], k[:end], scale, sinks, self._page_size)
            mass = torch.exp(logits - lse[..., None]).unflatten(-1, (-1, self._page_size)).sum(-1)
            inside = (mass * kept[start:stop, None, : mass.shape[-1]]).sum(-1) / mass.sum(-1)
            total, count = self._step.recall.get(layer, (0.0, 0))
            self._step.recall[layer] = (total + float(inside.double().sum()), count + inside.numel())
