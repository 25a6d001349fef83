"""What evicting methods share: the worst pages go, every so many steps."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.field import Evicting
from deltakv.methods.base import Picks, marked
from deltakv.methods.memory import Tally
from deltakv.ops import select_pages


def drop_worst(
    config: Evicting, scores: Tensor, worth: Tensor, tally: Tally, seq_lens: Tensor, page_size: int
) -> Tally:
    """The tally after one step more, with the new `worth`; if it is time, without all but `budget` of the pages.

    scores: fp32 [rows, width]: sinks and recent pages stay, and the best of the rest by these, as in DELTA's pick.
    """
    limits = config.budget_pages, config.recent_pages, config.sink_pages, config.min_context
    least = torch.finfo(scores.dtype).min  # what is dropped already comes behind whatever is not
    alive = scores.clamp_min(least).masked_fill(tally.dropped, float("-inf"))
    kept = marked(Picks(*select_pages(alive, seq_lens, page_size, *limits)), scores.shape[1])
    steps = tally.steps + 1
    exists = torch.arange(scores.shape[1], device=scores.device) * page_size < seq_lens[:, None]
    now = (steps % config.lag == 0)[:, None]
    return Tally(worth, tally.dropped | (now & exists & ~kept), steps)
