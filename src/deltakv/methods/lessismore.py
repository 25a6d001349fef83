"""LessIsMore (arXiv 2508.07101), section 3: one ranking from all heads, and a window of recent tokens of fixed share.

Each head ranks what is neither sink nor recent; the rankings are merged place by place (every head's first, then every
head's second, ...) until the budget is full. Deviations from the paper: pages are ranked by the attention on them,
where the paper ranks tokens; the plan is TidalDecode's by depth, where the paper picks the second selecting layer by
model.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltakv.field import LessIsMore
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.ops import interleaved, page_masses, select_pages


@dataclass(frozen=True)
class LessIsMoreSelector:
    """The first of the merged ranking."""

    config: LessIsMore

    def pick(self, stats: SoftmaxStats) -> Picks:
        c = self.config
        masses = page_masses(stats.logits, stats.peaks, stats.lse, stats.seq_lens, stats.page_size)
        scores = interleaved(masses, stats.seq_lens, stats.page_size, c.recent_pages, c.sink_pages)
        limits = c.budget_pages, c.recent_pages, c.sink_pages, c.min_context
        return Picks(*select_pages(scores, stats.seq_lens, stats.page_size, *limits))
