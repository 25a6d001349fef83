"""Quest (arXiv 2406.10774), section 3.3: the pages whose bounds promise most, in every layer but the first two.

Deviations from the paper: one pick for all heads, where Quest has one a head; bounds of different heads are compared
relative to each head's best page (`ops/bound_scores`). The page of the current token is always kept, as it may be
partly filled and has no bounds yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltakv.field import Quest
from deltakv.methods.base import PageBounds, Picks
from deltakv.ops import bound_scores, select_pages


@dataclass(frozen=True)
class QuestSelector:
    """The best pages by the most that they could be worth to any query head."""

    config: Quest

    def pick(self, seen: PageBounds) -> Picks:
        scores = bound_scores(seen.query, seen.low, seen.high, seen.seq_lens, seen.scale, seen.page_size)
        c = self.config
        limits = c.budget_pages, c.recent_pages, c.sink_pages, c.min_context
        return Picks(*select_pages(scores, seen.seq_lens, seen.page_size, *limits))
