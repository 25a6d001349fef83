"""Evaluation mode: one forward over several tokens in which each position picks for itself.

The K and V of a position depend on its own hidden state alone, so a forward over m teacher-forced tokens in which
every position attends as it would have if decoded gives what m decode steps give. The positions are the rows that
a method's selector sees; where a method remembers, they take their turns in order, each layer by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltakv.config import Method, Sees
from deltakv.methods import Lengths, Memory, PageBounds, Picks, SoftmaxStats, Tally, listed, marked, window_of
from deltakv.ops import chunk_attention, chunk_logits, page_masses
from deltakv.plan import Role

#: Positions whose logits are held at once: 64 of 32 heads over 32k tokens are 256 MB.
BLOCK = 64


@dataclass
class Trace:
    """What evaluation mode saw.

    picks: for each SELECT layer one int tensor a position, its logical pages (all of them for a dense row); filled
        if `positions(picks=True)`.
    recall: for each layer that attends to a pick or a window the mass of full attention inside it, mean over heads and
        positions; filled if `positions(recall=True)`. A dense row's pick holds all of it; the mass of learned sinks
        does not count.
    """

    picks: dict[int, list[Tensor]] = field(default_factory=dict)
    recall: dict[int, float] = field(default_factory=dict)


@dataclass
class _Seen:
    """What one forward has seen so far. kept_tokens: by SELECT layer, the tokens of each position's pick, by block;
    looked_at: likewise, what a layer that attends to its pick reads beside it; windows: by row, the pages that its
    positions keep in WINDOW layers, and the tokens on them; recall: by layer, the sum over heads and positions, and how
    many they are."""

    kept_tokens: dict[int, list[Tensor]] = field(default_factory=dict)
    looked_at: dict[int, list[Tensor]] = field(default_factory=dict)
    picks: dict[int, list[Tensor]] = field(default_factory=dict)
    windows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    recall: dict[int, tuple[float, int]] = field(default_factory=dict)


class Positions:
    """Carries out evaluation mode for one `with handle.positions()` block."""

    def __init__(self, method: Method, selector: Any, *, picks: bool, recall: bool) -> None:
        self.trace = Trace()
        self._method = method
        self._selector = selector
        self._page_size = method.page_size
        self._want_picks, self._want_recall = picks, recall
        self._kept: dict[int, Tensor] = {}
        self._recall: dict[int, tuple[float, int]] = {}
        self._step = _Seen()

    def commit(self) -> tuple[list[Tensor], list[Tensor]]:
        """The forward came through: what it saw counts. Returns what `Meter.add` wants as `kept_tokens` and as
        `looked_at`, each position a row."""
        step, self._step = self._step, _Seen()
        for layer, picks in step.picks.items():
            self.trace.picks.setdefault(layer, []).extend(picks)
        for layer, (mass, count) in step.recall.items():
            old_mass, old_count = self._recall.get(layer, (0.0, 0))
            self._recall[layer] = (old_mass + mass, old_count + count)
            self.trace.recall[layer] = self._recall[layer][0] / self._recall[layer][1]
        kept, looked_at = step.kept_tokens, step.looked_at
        kept_tokens = [torch.cat([tokens for _, tokens in step.windows.values()])] if step.windows else []
        kept_tokens += [torch.cat(kept[at]) for at in sorted(kept)]
        return kept_tokens, [torch.cat(looked_at[at]) for at in sorted(looked_at)]

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
        memory: Memory | Tally | None = None,
    ) -> tuple[Tensor, Memory | Tally | None]:
        """q [m, n_heads, head_dim] are the last m of T positions of a row; k, v [T, n_kv_heads, head_dim].

        memory: of this row and layer, if the method remembers. Returns attention's output, and the memory afterwards.
        """
        kept = visible = None
        if role is Role.SELECT:
            kept, everything, memory = self._pick(layer, q, k, scale, sinks, memory)
            self._kept[row] = kept
            if self._method.attends_to_own_pick:
                visible = kept | everything[:, None]
        elif role is Role.REUSE:
            kept = visible = self._kept[row].to(q.device)
        elif role is Role.WINDOW:
            kept = visible = self._window(row, len(q), len(k), q.device)
        if visible is not None and kept is not None and self._want_recall:
            self._add_recall(layer, q, k, scale, sinks, kept)
        return chunk_attention(q, k, v, scale, sinks, visible, self._page_size), memory

    def _pick(
        self, layer: int, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None, memory: Memory | Tally | None
    ) -> tuple[Tensor, Tensor, Memory | Tally | None]:
        """bool [m, n_pages]: the pages that each position keeps; bool [m]: which attend to everything all the same; and
        the memory afterwards."""
        m, tokens = len(q), len(k)
        width = -(-tokens // self._page_size)
        kept = torch.zeros((m, width), dtype=torch.bool, device=q.device)
        everything = torch.zeros(m, dtype=torch.bool, device=q.device)
        for start in range(0, m, BLOCK):
            stop = min(start + BLOCK, m)
            end = tokens - m + stop
            seq_lens = torch.arange(end - (stop - start) + 1, end + 1, dtype=torch.int32, device=q.device)
            seen = self._look(q[start:stop], k[:end], scale, sinks, seq_lens)
            due = torch.ones_like(everything[start:stop])
            if isinstance(memory, Tally):
                picks, memory = self._evicting(seen, sinks, memory)
            elif memory is not None:
                picks, due, memory = self._in_order(q[start:stop], seen, memory)
                everything[start:stop] = due & (self._method.sees is Sees.SOFTMAX)
            else:
                picks = self._selector.pick(seen)
            kept[start:stop] = marked(picks, width)
            kept_tokens = self._tokens_on(picks, seq_lens)
            self._step.kept_tokens.setdefault(layer, []).append(kept_tokens)
            if self._method.attends_to_own_pick:
                looked_at = self._looked_at(seq_lens, kept_tokens)
                self._step.looked_at.setdefault(layer, []).append(torch.where(due, looked_at, 0))
        if self._want_picks:
            self._step.picks.setdefault(layer, []).extend(row.nonzero().flatten().cpu() for row in kept)
        return kept, everything, memory

    def _window(self, row: int, m: int, tokens: int, device: torch.device) -> Tensor:
        """bool [m, n_pages]: the pages that the last m of a row's `tokens` positions keep in WINDOW layers; made once a
        forward."""
        if row not in self._step.windows:
            seq_lens = torch.arange(tokens - m + 1, tokens + 1, dtype=torch.int32, device=device)
            width = -(-tokens // self._page_size)
            picks = window_of(self._method, Lengths(seq_lens, self._page_size, width))
            self._step.windows[row] = marked(picks, width), self._tokens_on(picks, seq_lens)
        return self._step.windows[row][0].to(device)

    def _tokens_on(self, picks: Picks, seq_lens: Tensor) -> Tensor:
        """int32 [rows]: only the last page, which each pick holds, may be partly filled."""
        return picks.n_kept * self._page_size - -seq_lens % self._page_size

    def _look(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None, seq_lens: Tensor) -> Any:
        """What the positions' selector sees; q and k end with the last of them."""
        page_size, m = self._page_size, len(q)
        if self._method.sees is Sees.LENGTHS:
            return Lengths(seq_lens, page_size, -(-len(k) // page_size))
        if self._method.sees is Sees.BOUNDS:
            # A position's own page, of which it may see a part, is not looked at: so bounds of whole pages serve all.
            pages = F.pad(k, (0, 0, 0, 0, 0, -len(k) % page_size)).unflatten(0, (-1, page_size))
            low, high = (x.expand(m, -1, -1, -1) for x in (pages.amin(1), pages.amax(1)))
            return PageBounds(q, scale, low, high, seq_lens, page_size)
        logits, lse = chunk_logits(q, k, scale, sinks, page_size)
        return SoftmaxStats(logits[:, None], torch.zeros_like(lse)[:, None], lse, seq_lens, page_size)

    def _in_order(self, q: Tensor, seen: SoftmaxStats, memory: Memory) -> tuple[Picks, Tensor, Memory]:
        """The picks of positions one after the other, which of them were due, and the memory of the last."""
        scores = self._selector.score(seen)
        scores = F.pad(scores, (0, memory.scores.shape[1] - scores.shape[1]))
        standing, due = [], []
        for at in range(len(q)):
            one = slice(at, at + 1)
            due.append(self._selector.due(q[one], memory, seen.seq_lens[one]))
            memory = memory.renewed(due[-1], q[one], scores[one], seen.seq_lens[one])
            standing.append(memory.standing(self._page_size))
        picks = self._selector.choose(torch.cat(standing)[:, : seen.width], seen.seq_lens, self._page_size)
        return picks, torch.cat(due), memory

    def _evicting(self, seen: SoftmaxStats, sinks: Tensor | None, tally: Tally) -> tuple[Picks, Tally]:
        """What is left for each position, one after the other, and the tally after the last."""
        page_size, width = self._page_size, tally.dropped.shape[1]
        token = torch.arange(seen.width * page_size, device=seen.lse.device)
        left = []
        for at in range(len(seen.seq_lens)):
            left.append(~tally.dropped & (torch.arange(width, device=token.device) * page_size < seen.seq_lens[at]))
            visible = left[-1][0, token // page_size]
            logits = seen.logits[at : at + 1].masked_fill(~visible, float("-inf"))
            lse = torch.logsumexp(logits[:, 0], dim=-1)
            lse = lse if sinks is None else torch.logaddexp(lse, sinks.float())
            masses = page_masses(logits, seen.peaks[at : at + 1], lse, seen.seq_lens[at : at + 1], page_size)
            masses = F.pad(masses, (0, width - masses.shape[2]))
            tally = self._selector.after_step(masses, tally, seen.seq_lens[at : at + 1], page_size)
        return listed(torch.cat(left)[:, : seen.width]), tally

    def _looked_at(self, seq_lens: Tensor, kept_tokens: Tensor) -> Tensor:
        """What a SELECT layer that attends to its pick reads beside it, where it is due: as at a decode step."""
        if self._method.evicts:
            return torch.zeros_like(seq_lens)
        if self._method.sees is Sees.SOFTMAX:
            return seq_lens - kept_tokens
        if self._method.sees is Sees.KEYS:
            return (seq_lens + 1) // 2
        return -(-seq_lens // self._page_size) if self._method.sees is Sees.BOUNDS else torch.zeros_like(seq_lens)

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
