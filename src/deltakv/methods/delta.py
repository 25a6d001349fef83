"""DELTA (arXiv 2510.09883, ACL Findings 2026), section 3.

Deviation from the paper: sink pages may be forced (off in the paper), because a small model loses more without them.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltakv.config import Delta
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.ops import page_scores, select_pages


@dataclass(frozen=True)
class DeltaSelector:
    """Sinks, recent pages, and the best of the rest by the mass that any query head puts on their tokens."""

    config: Delta

    def pick(self, stats: SoftmaxStats) -> Picks:
        scores = page_scores(stats.logits, stats.peaks, stats.lse, stats.seq_lens, stats.page_size)
        return Picks(
            *select_pages(
                scores,
                stats.seq_lens,
                stats.page_size,
                self.config.budget_pages,
                self.config.recent_pages,
                self.config.sink_pages,
                self.config.min_context,
            )
        )
