"""Selection by mass as a few sorts over the whole batch, without a look at a value on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.select_pages.naive import kept_width


def select_mass(
    masses: Tensor,
    seq_lens: Tensor,
    page_size: int,
    share: float,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    min_context: int,
) -> tuple[Tensor, Tensor]:
    """See `naive.select_mass`."""
    width = masses.shape[1]
    page = torch.arange(width, dtype=torch.int32, device=masses.device)
    n = ((seq_lens + page_size - 1) // page_size)[:, None]
    exists = page < n
    forced = exists & ((page < sink_pages) | (page >= n - recent_pages))
    masses = masses.masked_fill(~exists, 0.0)
    by_mass = torch.argsort(masses.masked_fill(~exists, -1.0), dim=1, descending=True, stable=True)
    rank_class = torch.where(forced, 0, torch.where(exists, 1, 2))
    order = by_mass.gather(1, torch.argsort(rank_class.gather(1, by_mass), dim=1, stable=True))
    held = masses.gather(1, order).double().cumsum(1)  # in double: the order of summing does not show
    before = held - masses.gather(1, order)
    taken = (page < budget_pages) & (before < share * held[:, -1:])
    kept = torch.zeros_like(exists).scatter(1, order, taken)
    kept = exists & (kept | forced | (seq_lens[:, None] <= min_context))
    n_kept = kept.sum(1, dtype=torch.int32)
    ascending = torch.sort(torch.where(kept, page, width), dim=1).values
    ascending = ascending[:, : kept_width(width, page_size, budget_pages, min_context)]
    return torch.where(ascending < width, ascending, 0).to(torch.int32), n_kept
