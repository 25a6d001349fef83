"""Tactic (arXiv 2502.12216), section 3: the fewest tokens that hold a given share of the attention.

Deviations from the paper: SELECT layers know the attention, so nothing is estimated, where Tactic clusters K and fits a
curve to the tail in every layer; the layers between reuse the pick (DELTA's plan). Whole pages; one pick for all heads,
by their mean, where Tactic has one a KV head. A budget caps the pick, because shapes on a GPU do not follow data.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltakv.field import Tactic
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.ops import page_masses, select_mass


@dataclass(frozen=True)
class TacticSelector:
    """Pages by the attention on them, until they hold their share of it."""

    config: Tactic

    def pick(self, stats: SoftmaxStats) -> Picks:
        c = self.config
        masses = page_masses(stats.logits, stats.peaks, stats.lse, stats.seq_lens, stats.page_size).mean(1)
        limits = c.budget_pages, c.recent_pages, c.sink_pages, c.min_context
        return Picks(*select_mass(masses, stats.seq_lens, stats.page_size, c.mass, *limits))
