"""Page selection as a few sorts over the whole batch, without a loop over rows or a look at a value on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.select_pages.naive import kept_width


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    min_context: int,
) -> tuple[Tensor, Tensor]:
    """See `naive.select_pages`."""
    width = scores.shape[1]
    page = torch.arange(width, dtype=torch.int32, device=scores.device)
    n = ((seq_lens + page_size - 1) // page_size)[:, None]
    exists = page < n
    forced = exists & ((page < sink_pages) | (page >= n - recent_pages))
    # Forced pages first, then by score; a stable sort leaves equal pages in ascending order. Classes are sorted
    # apart from scores, so that no score, not even an infinite one, can push a forced page out.
    by_score = torch.argsort(scores.masked_fill(~exists, float("-inf")), dim=1, descending=True, stable=True)
    rank_class = torch.where(forced, 0, torch.where(exists, 1, 2))
    by_class = torch.argsort(rank_class.gather(1, by_score), dim=1, stable=True)
    chosen = by_score.gather(1, by_class)[:, :budget_pages]
    kept = torch.zeros_like(exists).scatter_(1, chosen, True)
    dense = (seq_lens[:, None] <= min_context) | (n <= budget_pages)
    kept = torch.where(dense, exists, kept & exists)
    n_kept = kept.sum(1, dtype=torch.int32)
    ascending = torch.sort(torch.where(kept, page, width), dim=1).values
    ascending = ascending[:, : kept_width(width, page_size, budget_pages, min_context)]
    return torch.where(ascending < width, ascending, 0).to(torch.int32), n_kept
