"""DELTA (arXiv 2510.09883, ACL Findings 2026), section 3.

Deviation from the paper: sink pages may be forced (off in the paper), because a small model loses more without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltakv.config import Delta
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.ops import page_scores, select_pages


@dataclass(frozen=True)
class DeltaSelector:
    """Sinks, recent pages, and the best of the rest by the mass that any query head puts on their tokens."""

    config: Delta

    def pick(self, stats: SoftmaxStats) -> Picks:
        return Picks(
            *select_pages(
                _scores(stats),
                stats.seq_lens,
                stats.page_size,
                self.config.budget_pages,
                self.config.recent_pages,
                self.config.sink_pages,
                self.config.min_context,
            )
        )


def _scores(stats: SoftmaxStats) -> Tensor:
    """fp32 [rows, pages]. The max over heads comes before the sum over tokens, so ranks that hold a part of the heads
    each have to agree on tokens: a page of one token is worth its token's score."""
    if stats.across is None:
        return page_scores(stats.logits, stats.peaks, stats.lse, stats.seq_lens, stats.page_size)
    tokens = page_scores(stats.logits, stats.peaks, stats.lse, stats.seq_lens, 1)
    return stats.by_page(tokens, torch.sum)
