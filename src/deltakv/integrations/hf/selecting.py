"""What a SELECT layer does at a decode step: attends, and picks, in the order that the method's config says. And what
WINDOW layers attend to, which nobody has to pick."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltakv.config import Method, Sees
from deltakv.integrations.hf.known import Known
from deltakv.integrations.hf.step import Pick, Step
from deltakv.methods import Lengths, PageBounds, Picks, SoftmaxStats, listed, window_of
from deltakv.ops import decode_attention, decode_attention_stats, page_masses


class Selecting:
    """The SELECT and WINDOW layers of a method; one token a row.

    method, selector: the config and what carries it out.
    """

    def __init__(self, method: Method, selector: Any) -> None:
        self.method = method
        self.selector = selector

    def attend(
        self,
        step: Step,
        known: Known,
        layer: int,
        query: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Query and result [batch, n_heads, head_dim]. The pick is the step's from here on."""
        table, lens = step.on(query.device, "block_table"), step.on(query.device, "seq_lens")
        if self.method.evicts:
            return self._evicting(step, known, layer, query, k_pool, v_pool, scale, sinks)
        if self.method.remembers:
            return self._remembering(step, known, layer, query, k_pool, v_pool, scale, sinks)
        page_size, width = k_pool.shape[1], table.shape[2]
        if self.method.sees is Sees.SOFTMAX:
            if self.method.keeps_all(width * page_size):
                # Not even a row that fills the table would lose a page. A shape says so, and no graph shows it.
                step.picked(_everything(layer, table, lens, page_size))
                return decode_attention(query, k_pool, v_pool, table, lens, scale, sinks)
            out, logits, peaks, lse = decode_attention_stats(query, k_pool, v_pool, table, lens, scale, sinks)
            picks = self.selector.pick(SoftmaxStats(logits, peaks, lse, lens[:, 0], page_size))
            step.picked(_pick(layer, picks, table, lens, page_size))
            return out
        looked_at = torch.zeros_like(lens[:, 0])
        if self.method.sees is Sees.BOUNDS:
            last = ((lens[:, 0] - 1).clamp_min(0) // page_size).long()
            pages = table[:, 0].gather(1, last[:, None])[:, 0].long()
            low, high = known.note_page(layer, k_pool, pages, lens[:, 0])
            step.noted = True
            seen: Any = PageBounds(query, scale, low[:, :width], high[:, :width], lens[:, 0], page_size)
            looked_at = (lens[:, 0] + page_size - 1) // page_size
        else:
            seen = Lengths(lens[:, 0], page_size, width)
        pick = _pick(layer, self.selector.pick(seen), table, lens, page_size, looked_at)
        step.picked(pick)
        return decode_attention(query, k_pool, v_pool, pick.block_table, pick.seq_lens, scale, sinks)

    def window(self, step: Step, layer: int, device: torch.device) -> Pick:
        """What the WINDOW layers of a step attend to: made by the first of them, `layer`, for all."""
        if step.window is None:
            table, lens = step.on(device, "block_table"), step.on(device, "seq_lens")
            page_size, width = self.method.page_size, table.shape[2]
            if self.method.keeps_all(width * page_size):
                step.window = _everything(layer, table, lens, page_size)
            else:
                seen = Lengths(lens[:, 0], page_size, width)
                step.window = _pick(layer, window_of(self.method, seen), table, lens, page_size)
        return step.window

    def _remembering(
        self,
        step: Step,
        known: Known,
        layer: int,
        query: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Rows that are due look at the whole row; for the others the last look stands. All in one call of the op: a
        row that is not due has a shorter table, or none."""
        table, lens = step.on(query.device, "block_table"), step.on(query.device, "seq_lens")
        page_size, width = k_pool.shape[1], table.shape[2]
        memory = known.memory(layer, width)
        due = self.selector.due(query, memory, lens[:, 0])
        looking = torch.where(due[:, None], lens, 0)
        if self.method.sees is Sees.KEYS:
            # V is not asked for: with K in its place, nothing more is read.
            _, logits, peaks, lse = decode_attention_stats(query, k_pool, k_pool, table, looking, scale, sinks)
        else:
            kept = self.selector.choose(memory.standing(page_size), lens[:, 0], page_size)
            short = _pick(layer, kept, table, lens, page_size)
            padded = F.pad(short.block_table, (0, width - short.block_table.shape[2]))
            mixed = torch.where(due[:, None, None], table, padded)
            mixed_lens = torch.where(due[:, None], lens, short.seq_lens)
            out, logits, peaks, lse = decode_attention_stats(query, k_pool, v_pool, mixed, mixed_lens, scale, sinks)
        scores = self.selector.score(SoftmaxStats(logits, peaks, lse, looking[:, 0], page_size))[:, :width]
        memory = memory.renewed(due, query, scores, lens[:, 0])
        step.memories[layer] = memory
        picks = self.selector.choose(memory.standing(page_size), lens[:, 0], page_size)
        pick = _pick(layer, picks, table, lens, page_size)
        if self.method.sees is Sees.KEYS:
            looked_at = (looking[:, 0] + 1) // 2
            out = decode_attention(query, k_pool, v_pool, pick.block_table, pick.seq_lens, scale, sinks)
        else:
            looked_at = torch.where(due, lens[:, 0] - pick.seq_lens[:, 0], 0)
        step.picked(Pick(layer, picks, pick.block_table, pick.seq_lens, looked_at))
        return out

    def _evicting(
        self,
        step: Step,
        known: Known,
        layer: int,
        query: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attends to what has not been dropped, and says what is dropped from the next step on."""
        table, lens = step.on(query.device, "block_table"), step.on(query.device, "seq_lens")
        page_size, width = k_pool.shape[1], table.shape[2]
        tally = known.memory(layer, width)
        exists = torch.arange(width, device=query.device) * page_size < lens
        left = listed(exists & ~tally.dropped)
        pick = _pick(layer, left, table, lens, page_size, torch.zeros_like(lens[:, 0]))
        step.picked(pick)
        attention = decode_attention_stats(query, k_pool, v_pool, pick.block_table, pick.seq_lens, scale, sinks)
        out, logits, peaks, lse = attention
        masses = page_masses(logits, peaks, lse, pick.seq_lens[:, 0], page_size)[..., :width]
        at = left.pages.long()[:, None].expand_as(masses)  # beyond the last page left: 0, and nothing to add there
        masses = torch.zeros_like(masses).scatter_add(2, at, masses)
        step.memories[layer] = self.selector.after_step(masses, tally, lens[:, 0], page_size)
        return out


def _pick(
    layer: int, picks: Picks, table: Tensor, lens: Tensor, page_size: int, looked_at: Tensor | None = None
) -> Pick:
    """A pick as a compact table."""
    missing = -lens[:, 0] % page_size  # empty slots of the last page
    return Pick(
        layer=layer,
        pages=picks,
        block_table=table[:, 0].gather(1, picks.pages.long())[:, None],
        seq_lens=(picks.n_kept * page_size - missing)[:, None],
        looked_at=looked_at,
    )


def _everything(layer: int, block_table: Tensor, seq_lens: Tensor, page_size: int) -> Pick:
    """The pick of a SELECT layer whose rows keep all their pages. Arguments: the layer's index; as in `Step`."""
    n_pages = (seq_lens[:, 0] + page_size - 1) // page_size
    pages = torch.arange(block_table.shape[-1], dtype=torch.int32, device=block_table.device)
    kept = torch.where(pages < n_pages[:, None], pages, 0)
    return Pick(layer, Picks(kept, n_pages), block_table, seq_lens)
