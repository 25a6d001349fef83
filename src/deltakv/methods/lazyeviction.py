"""LazyEviction (arXiv 2506.15969), section 4: what recurs is kept until it is overdue.

A page is active at a step if a head puts at least `alpha` on it. The longest time from one activity to the next is its
maximum recurrence interval (MRI). Every `lag` steps (the paper's observation window) pages go by the time since they
were last active, as a multiple of their MRI: the order of the paper's sigmoid of that ratio. Deviations from the paper:
whole pages, and so a larger `alpha` than its 0.0001 a token; one set for all heads of a layer (active for one is
active); a page that has never recurred counts as overdue by infinitely much, unless it is active now; the prompt's own
attention is not counted. The paper's further term, which weighs the MRI itself, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltakv.field import LazyEviction
from deltakv.methods.evicting import drop_worst
from deltakv.methods.memory import Tally


@dataclass(frozen=True)
class LazyEvictor:
    """Worth is two numbers a page: the step at which it was last active (0: never), and its MRI in steps (0: none)."""

    config: LazyEviction
    numbers: ClassVar[int] = 2

    def after_step(self, masses: Tensor, tally: Tally, seq_lens: Tensor, page_size: int) -> Tally:
        now = (tally.steps + 1).float()[:, None]
        last, interval = tally.worth.unbind(-1)
        active = masses.amax(1) >= self.config.alpha
        interval = torch.where(active & (last > 0), torch.maximum(interval, now - last), interval)
        last = torch.where(active, now, last)
        quiet = now - last
        overdue = torch.where(quiet == 0, 0.0, quiet / interval)  # by a zero: infinitely
        return drop_worst(self.config, -overdue, torch.stack([last, interval], -1), tally, seq_lens, page_size)
