"""H2O (arXiv 2306.14048), section 4: heavy hitters by accumulated attention, and recent tokens.

Deviations from the paper: whole pages, by the attention on their tokens; one set for all heads of a layer (their sum),
where the paper has one a head; pages go every `lag` steps, not one token at each; attention is counted from the first
decode step on, and the prompt's own is not, so that a cache that was filled under another method will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltakv.field import H2O
from deltakv.methods.evicting import drop_worst
from deltakv.methods.memory import Tally


@dataclass(frozen=True)
class H2OEvictor:
    """Worth is all attention so far."""

    config: H2O
    numbers: ClassVar[int] = 1

    def after_step(self, masses: Tensor, tally: Tally, seq_lens: Tensor, page_size: int) -> Tally:
        worth = tally.worth + masses.sum(1)[..., None]
        return drop_worst(self.config, worth[..., 0], worth, tally, seq_lens, page_size)
