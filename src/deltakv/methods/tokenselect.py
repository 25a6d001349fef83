"""TokenSelect (arXiv 2411.02886), section 4: every layer lets its heads vote, unless its query is like the last one.

Each head's softmax over the tokens is its vote, and the sum over heads decides (the soft vote, 4.2); a query whose
cosine to the one that last voted is above a threshold takes over its result (the selection cache, 4.3). Deviations from
the paper: whole pages, by the votes on their tokens; pages that have come since the last vote are kept; prompts are
read in full, where the paper selects in prefill too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltakv.field import TokenSelect
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.methods.memory import Memory
from deltakv.ops import page_masses, select_pages


@dataclass(frozen=True)
class TokenSelectSelector:
    """A `Refresher`: votes when the query has turned."""

    config: TokenSelect

    def due(self, query: Tensor, memory: Memory, seq_lens: Tensor) -> Tensor:
        return (memory.seen == 0) | (memory.likeness(query) <= self.config.similarity)

    def score(self, stats: SoftmaxStats) -> Tensor:
        return page_masses(stats.logits, stats.peaks, stats.lse, stats.seq_lens, stats.page_size).sum(1)

    def choose(self, scores: Tensor, seq_lens: Tensor, page_size: int) -> Picks:
        c = self.config
        limits = c.budget_pages, c.recent_pages, c.sink_pages, c.min_context
        return Picks(*select_pages(scores, seq_lens, page_size, *limits))
