"""The pick that needs no scores: the first pages and the latest ones, known from how long a row is.

StreamingLLM (arXiv 2309.17453) is this pick and no other; in any plan it is what WINDOW layers attend to.
"""

from __future__ import annotations

import torch

from deltakv.config import Budgeted, Method
from deltakv.methods.base import Lengths, Picks
from deltakv.ops import select_pages


def first_and_latest(seen: Lengths, first: int, latest: int, min_context: int = 0) -> Picks:
    """The `first` pages and the `latest` ones of each row; all, of a row that has no more or at most `min_context`
    tokens. A budget of just these, so that nothing is left to score."""
    scores = torch.zeros((len(seen.seq_lens), seen.width), device=seen.seq_lens.device)
    return Picks(*select_pages(scores, seen.seq_lens, seen.page_size, first + latest, latest, first, min_context))


def window_of(method: Method, seen: Lengths) -> Picks:
    """What the WINDOW layers of a step attend to: the method's sinks, and recent pages for all the rest of its budget.

    Each row on its own, as a `Selector` picks. No value is looked at, so it can be traced.
    """
    assert isinstance(method, Budgeted), "a plan with WINDOW layers is refused for methods without a budget"
    first = method.sink_pages
    return first_and_latest(seen, first, method.budget_pages - first, method.min_context)
