"""TidalDecode (arXiv 2410.05076), section 3: position persistent sparse attention.

Two layers FULL, one that selects behind them and one that selects again in the middle; all others reuse the pick.
Deviations from the paper: the pages of the best tokens are kept, not these tokens alone; one pick for all heads (a
token counts by the head that wants it most), where the paper has one a head; the page of the current token is always
in. The plan is the paper's for 32 layers, scaled. The cache correction (section 3.3), which recomputes K and V of
decoded tokens now and then, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakv.field import TidalDecode
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.ops import page_scores, select_pages


@dataclass(frozen=True)
class TidalSelector:
    """The pages that hold the best tokens."""

    config: TidalDecode

    def pick(self, stats: SoftmaxStats) -> Picks:
        tokens = page_scores(stats.logits, stats.peaks, stats.lse, stats.seq_lens, 1)
        scores = stats.by_page(tokens, torch.amax)
        c = self.config
        limits = c.budget_pages, c.recent_pages, c.sink_pages, c.min_context
        return Picks(*select_pages(scores, stats.seq_lens, stats.page_size, *limits))
