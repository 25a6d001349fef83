"""A pick as a block table, for rows some of which may keep all."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.narrow_table import naive
from deltakv.ops.registry import Lazy, register

_triton = Lazy("deltakv.ops.narrow_table.triton")


def _fake(block_table: Tensor, seq_lens: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(block_table), torch.empty_like(seq_lens)


narrow_table = register(
    "narrow_table(Tensor block_table, Tensor seq_lens, Tensor pages, Tensor n_kept, Tensor whole, int page_size) "
    "-> (Tensor, Tensor)",
    cpu=naive.narrow_table,
    cuda=_triton.narrow_table,
    fake=_fake,
)
