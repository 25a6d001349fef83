"""Quest's bounds: what a page could be worth at most, without reading it."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.bound_scores import by_group
from deltakv.ops.registry import register


def _fake(q: Tensor, low: Tensor, _high: Tensor, _lens: Tensor, _scale: float, _page_size: int) -> Tensor:
    return q.new_empty(low.shape[:2], dtype=torch.float32)


bound_scores = register(
    "bound_scores(Tensor q, Tensor low, Tensor high, Tensor seq_lens, float scale, int page_size) -> Tensor",
    cpu=by_group.bound_scores,
    cuda=by_group.bound_scores,
    fake=_fake,
)
