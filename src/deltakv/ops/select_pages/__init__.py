"""Exact, deterministic page selection, each row on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.registry import register
from deltakv.ops.select_pages import vectorised


def _fake(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return (
        scores.new_empty(scores.shape, dtype=torch.int32),
        scores.new_empty(scores.shape[:1], dtype=torch.int32),
    )


select_pages = register(
    "select_pages(Tensor scores, Tensor seq_lens, int page_size, int budget_pages, int recent_pages, int sink_pages, "
    "int min_context) -> (Tensor, Tensor)",
    cpu=vectorised.select_pages,
    cuda=vectorised.select_pages,
    fake=_fake,
)
