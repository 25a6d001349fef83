"""Exact, deterministic page selection, each row on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.registry import Lazy, register
from deltakv.ops.select_pages import vectorised
from deltakv.ops.select_pages.naive import kept_width

_triton = Lazy("deltakv.ops.select_pages.triton")


def _fake(
    scores: Tensor, _lens: Tensor, page_size: int, budget: int, _recent: int, _sinks: int, min_context: int
) -> tuple[Tensor, Tensor]:
    rows, width = scores.shape
    return (
        scores.new_empty((rows, kept_width(width, page_size, budget, min_context)), dtype=torch.int32),
        scores.new_empty(scores.shape[:1], dtype=torch.int32),
    )


select_pages = register(
    "select_pages(Tensor scores, Tensor seq_lens, int page_size, int budget_pages, int recent_pages, int sink_pages, "
    "int min_context) -> (Tensor, Tensor)",
    cpu=vectorised.select_pages,
    cuda=_triton.select_pages,
    fake=_fake,
)
