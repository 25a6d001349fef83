"""The pick of a WINDOW layer: sinks and the most recent pages (StreamingLLM, arXiv 2309.17453, section 3.2).

The same for every method with a budget, and for every WINDOW layer of a step: nothing is scored.
"""

from __future__ import annotations

import torch

from deltakv.config import Method
from deltakv.methods.base import Lengths, Picks
from deltakv.ops import select_pages


def window_pick(method: Method, seen: Lengths) -> Picks:
    """As many pages as another pick of the method has; rows that lose none there lose none here.

    method: one whose plans may have WINDOW layers (`method.windows`).
    """
    budget, sinks, min_context = (getattr(method, name) for name in ("budget_pages", "sink_pages", "min_context"))
    scores = torch.zeros((len(seen.seq_lens), seen.width), device=seen.seq_lens.device)
    return Picks(*select_pages(scores, seen.seq_lens, seen.page_size, budget, budget - sinks, sinks, min_context))
