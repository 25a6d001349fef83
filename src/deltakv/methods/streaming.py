"""StreamingLLM (arXiv 2309.17453), section 3.2: attention sinks and a window.

Deviations from the paper: whole pages, so the window begins at a page's edge; tokens keep the positions that they were
stored with, where the paper counts positions anew inside the window; and tokens that have left the window stay in
memory, unread, so that one cache can serve other methods too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakv.field import StreamingLLM
from deltakv.methods.base import Lengths, Picks
from deltakv.ops import select_pages


@dataclass(frozen=True)
class StreamingSelector:
    """The first pages and the last ones: a budget of just these, so that nothing is left to score."""

    config: StreamingLLM

    def pick(self, seen: Lengths) -> Picks:
        recent, sinks = self.config.recent_pages, self.config.sink_pages
        scores = torch.zeros((len(seen.seq_lens), seen.width), device=seen.seq_lens.device)
        return Picks(*select_pages(scores, seen.seq_lens, seen.page_size, recent + sinks, recent, sinks, 0))
