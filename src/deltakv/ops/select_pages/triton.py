"""Page selection on a GPU, in Triton: a row a program, the threshold found bit by bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltakv.ops.select_pages.naive import kept_width


@triton.jit
def _select(
    scores,
    lens,
    pages,
    n_kept,
    width,
    room,
    min_context,
    PAGE: tl.constexpr,
    BUDGET: tl.constexpr,
    RECENT: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens + row)
    n = (length + PAGE - 1) // PAGE
    page = tl.arange(0, BLOCK)
    exists = page < n
    kept = exists
    if (length > min_context) & (n > BUDGET):
        forced = exists & ((page < SINKS) | (page >= n - RECENT))
        free = exists & ~forced
        score = tl.load(scores + row * width + page, mask=free, other=0.0) + 0.0  # minus zero is zero
        bits = score.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
        need = BUDGET - tl.sum(forced.to(tl.int32), 0)
        # The largest threshold that at least `need` pages reach, its sign and then bit by bit, as far as it takes to
        # tell the pages to keep from the others.
        reach = tl.sum((free & (key >= 0)).to(tl.int32), 0)
        threshold = tl.where(reach >= need, 0, -2147483648)
        reach = tl.where(reach >= need, reach, tl.sum(free.to(tl.int32), 0))
        bit = 30
        while (bit >= 0) & (reach > need):
            higher = threshold + (1 << bit)
            count = tl.sum((free & (key >= higher)).to(tl.int32), 0)
            threshold = tl.where(count >= need, higher, threshold)
            reach = tl.where(count >= need, count, reach)
            bit -= 1
        above = free & (key > threshold)
        level = free & (key == threshold)
        rank = tl.cumsum(level.to(tl.int32), 0)  # of pages that tie, the earlier ones
        kept = forced | above | (level & (rank <= need - tl.sum(above.to(tl.int32), 0)))
    count = kept.to(tl.int32)
    place = tl.cumsum(count, 0) - 1
    total = tl.sum(count, 0)
    tl.store(n_kept + row, total)
    tl.store(pages + row * room + place, page, mask=kept)
    tl.store(pages + row * room + page, tl.zeros([BLOCK], tl.int32), mask=(page >= total) & (page < room))


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    min_context: int,
) -> tuple[Tensor, Tensor]:
    """See `naive.select_pages`."""
    rows, width = scores.shape
    scores, seq_lens = scores.float().contiguous(), seq_lens.contiguous()
    room = kept_width(width, page_size, budget_pages, min_context)
    pages = torch.empty((rows, room), dtype=torch.int32, device=scores.device)
    n_kept = torch.empty(rows, dtype=torch.int32, device=scores.device)
    block = triton.next_power_of_2(max(width, 1))
    if rows:
        _select[(rows,)](
            scores,
            seq_lens,
            pages,
            n_kept,
            width,
            room,
            min_context,
            PAGE=page_size,
            BUDGET=budget_pages,
            RECENT=recent_pages,
            SINKS=sink_pages,
            BLOCK=block,
            num_warps=min(32, max(4, block // 512)),
        )
    return pages, n_kept
