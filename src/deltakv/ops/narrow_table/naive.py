"""A pick as a block table."""

from __future__ import annotations

import torch
from torch import Tensor


def narrow_table(
    block_table: Tensor, seq_lens: Tensor, pages: Tensor, n_kept: Tensor, whole: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """The physical pages of what each row keeps, and the tokens on them.

    block_table: int32 [rows, width]; seq_lens: int32 [rows], tokens; pages: int32 [rows, room], the logical pages that
    a row keeps, ascending, of which the first n_kept, int32 [rows], count; the last one of a row that is not empty is
    its last page, which alone may be partly filled. whole: bool [rows], rows that keep all, whatever was picked.
    Returns a table, int32 [rows, width], of which a row's entries behind its last page mean nothing; and int32 [rows].
    """
    kept = block_table.gather(1, pages.long())
    room = pages.shape[1]
    table = block_table.clone()
    table[:, :room] = torch.where(whole[:, None], block_table[:, :room], kept)
    free = seq_lens % -page_size  # slots of the last page, as a negative number
    return table, torch.where(whole, seq_lens, torch.add(free, n_kept, alpha=page_size))
