"""DELTA's page scores from the softmax statistics of a decode attention."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.page_scores import native
from deltakv.ops.registry import Lazy, register

_triton = Lazy("deltakv.ops.page_scores.triton")


def _fake(logits: Tensor, _peaks: Tensor, _lse: Tensor, _seq_lens: Tensor, page_size: int) -> Tensor:
    rows, tiles, _heads, tile = logits.shape
    return logits.new_empty((rows, tiles * tile // page_size), dtype=torch.float32)


page_scores = register(
    "page_scores(Tensor logits, Tensor peaks, Tensor lse, Tensor seq_lens, int page_size) -> Tensor",
    cpu=native.page_scores,
    cuda=_triton.page_scores,
    fake=_fake,
)
