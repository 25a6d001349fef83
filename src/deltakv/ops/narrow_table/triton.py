"""A pick as a block table on a GPU, in Triton: one launch, where a captured graph would hold eight small ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Entries that a program copies at once.
_BLOCK = 1024


@triton.jit
def _narrow(
    block_table,
    seq_lens,
    pages,
    n_kept,
    whole,
    table,
    lens,
    width,
    room,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + row)
    kept = tl.load(n_kept + row)
    n_pages = (length + PAGE - 1) // PAGE
    block_table += row * width
    table += row * width
    if tl.load(whole + row) != 0:
        for start in range(0, n_pages, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(table + at, tl.load(block_table + at, mask=at < n_pages, other=0), mask=at < n_pages)
        tl.store(lens + row, length)
    else:
        for start in range(0, kept, BLOCK):
            at = start + tl.arange(0, BLOCK)
            page = tl.load(pages + row * room + at, mask=at < kept, other=0)
            tl.store(table + at, tl.load(block_table + page, mask=at < kept, other=0), mask=at < kept)
        tl.store(lens + row, length + (kept - n_pages) * PAGE)


def narrow_table(
    block_table: Tensor, seq_lens: Tensor, pages: Tensor, n_kept: Tensor, whole: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """See `naive.narrow_table`."""
    rows, width = block_table.shape
    block_table, seq_lens, pages, n_kept, whole = (
        x.contiguous() for x in (block_table, seq_lens, pages, n_kept, whole.view(torch.uint8))
    )
    table, lens = torch.empty_like(block_table), torch.empty_like(seq_lens)
    if rows:
        _narrow[(rows,)](
            block_table,
            seq_lens,
            pages,
            n_kept,
            whole,
            table,
            lens,
            width,
            pages.shape[1],
            PAGE=page_size,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return table, lens
