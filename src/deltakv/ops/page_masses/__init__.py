"""The attention that each head puts on each page, from the softmax statistics of a decode attention."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.page_masses import vectorised
from deltakv.ops.registry import register


def _fake(logits: Tensor, _peaks: Tensor, _lse: Tensor, _seq_lens: Tensor, page_size: int) -> Tensor:
    rows, tiles, n_heads, tile = logits.shape
    return logits.new_empty((rows, n_heads, tiles * tile // page_size), dtype=torch.float32)


page_masses = register(
    "page_masses(Tensor logits, Tensor peaks, Tensor lse, Tensor seq_lens, int page_size) -> Tensor",
    cpu=vectorised.page_masses,
    cuda=vectorised.page_masses,
    fake=_fake,
)
