"""Page selection by a share of the attention, each row on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.registry import register
from deltakv.ops.select_mass import vectorised
from deltakv.ops.select_pages.naive import kept_width


def _fake(
    masses: Tensor,
    _lens: Tensor,
    page_size: int,
    _share: float,
    budget: int,
    _recent: int,
    _sinks: int,
    min_context: int,
) -> tuple[Tensor, Tensor]:
    rows, width = masses.shape
    return (
        masses.new_empty((rows, kept_width(width, page_size, budget, min_context)), dtype=torch.int32),
        masses.new_empty(masses.shape[:1], dtype=torch.int32),
    )


select_mass = register(
    "select_mass(Tensor masses, Tensor seq_lens, int page_size, float share, int budget_pages, int recent_pages, "
    "int sink_pages, int min_context) -> (Tensor, Tensor)",
    cpu=vectorised.select_mass,
    cuda=vectorised.select_mass,
    fake=_fake,
)
