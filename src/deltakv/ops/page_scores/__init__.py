"""DELTA's page scores from the softmax statistics of a decode attention."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.page_scores import naive, native
from deltakv.ops.registry import register


def _fake(logits: Tensor, _lse: Tensor, _seq_lens: Tensor, page_size: int) -> Tensor:
    return logits.new_empty((logits.shape[0], logits.shape[2] // page_size), dtype=torch.float32)


page_scores = register(
    "page_scores(Tensor logits, Tensor lse, Tensor seq_lens, int page_size) -> Tensor",
    cpu=native.page_scores,
    cuda=naive.page_scores,
    fake=_fake,
)
