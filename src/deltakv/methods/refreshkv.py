"""RefreshKV (arXiv 2411.05787), section 3: a small cache for most steps, renewed by a full one when the query drifts.

Every layer has its own pick. Every `stride` steps it compares its query, averaged over heads, with that of its last
full step; unless they are alike it attends in full and picks anew. In between, new tokens push out the least of the
pick. Deviations from the paper: whole pages, scored as DELTA scores them (max over heads, as in the paper; the sum over
a page stands for its max-pooling); nothing is picked from the prompt, so the first step is a full one; sinks and recent
tokens may be forced, of the paper's "local" tokens one page at least.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltakv.field import RefreshKV
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.methods.memory import Memory, cosine
from deltakv.ops import page_scores, select_pages


@dataclass(frozen=True)
class RefreshKVSelector:
    """A `Refresher`: attends in full every so many steps, if the query has drifted."""

    config: RefreshKV

    def due(self, query: Tensor, memory: Memory, seq_lens: Tensor) -> Tensor:
        checks = (seq_lens - memory.seen) % self.config.stride == 0
        drifted = cosine(memory.query.mean(1), query.float().mean(1)) <= self.config.similarity
        return (memory.seen == 0) | (checks & drifted)

    def score(self, stats: SoftmaxStats) -> Tensor:
        return page_scores(stats.logits, stats.peaks, stats.lse, stats.seq_lens, stats.page_size)

    def choose(self, scores: Tensor, seq_lens: Tensor, page_size: int) -> Picks:
        c = self.config
        limits = c.budget_pages, c.recent_pages, c.sink_pages, c.min_context
        return Picks(*select_pages(scores, seq_lens, page_size, *limits))
