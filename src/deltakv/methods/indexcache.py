"""IndexCache (arXiv 2603.12201), section 3: full layers pick, shared layers reuse the pick of the nearest before them.

Training-free: which layers stay full is searched for greedily, by what their loss costs (`search`). Deviations from the
paper: there the models are trained with an indexer a layer (DSA), and a full layer runs its indexer and attends to the
pick; here a full layer is a SELECT layer, which attends in full and scores pages as DELTA does. The loss is the
caller's: the paper's is language modelling loss, `calibrate` takes KL. The variant with training is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from deltakv.field import IndexCache
from deltakv.methods.base import Picks, SoftmaxStats
from deltakv.ops import page_scores, select_pages
from deltakv.plan import LayerPlan, Role


@dataclass(frozen=True)
class IndexCacheSelector:
    """Pages by the mass that any query head puts on their tokens."""

    config: IndexCache

    def pick(self, stats: SoftmaxStats) -> Picks:
        tokens = page_scores(stats.logits, stats.peaks, stats.lse, stats.seq_lens, 1)
        scores = stats.by_page(tokens, torch.sum)
        c = self.config
        limits = c.budget_pages, c.recent_pages, c.sink_pages, c.min_context
        return Picks(*select_pages(scores, stats.seq_lens, stats.page_size, *limits))


def search(depth: int, loss: Callable[[LayerPlan], float], full: int) -> Iterator[tuple[LayerPlan, float]]:
    """The paper's greedy search (section 3.1): from every layer full, one more becomes shared at a time, the one that
    costs least.

    depth: layers that join the plan. loss: of a plan on calibration data, the less the better; called for each layer
    that could be next, (depth - 1) * depth / 2 times at most. full: how many stay full, at least 1; the first always
    does. Yields the plan and its loss after each round, so that a caller can show progress, keep the curve, and stop.
    Ties go to the earlier layer. Raises `ValueError` for `full` outside 1 to depth.
    """
    if not 1 <= full <= depth:
        raise ValueError(f"full={full} of {depth} layers; at least 1 and at most all can pick")
    roles = [Role.SELECT] * depth
    while roles.count(Role.SELECT) > full:
        tried = []
        for layer in range(1, depth):
            if roles[layer] is Role.SELECT:
                plan = LayerPlan((*roles[:layer], Role.REUSE, *roles[layer + 1 :]))
                tried.append((loss(plan), layer, plan))
        least, layer, plan = min(tried, key=lambda one: one[:2])
        roles[layer] = Role.REUSE
        yield plan, least
