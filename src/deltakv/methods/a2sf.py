"""A2SF (arXiv 2407.20485), section 3: accumulated attention with a forgetting factor.

Early tokens have been seen more often than late ones; so at each step what was accumulated before shrinks by a factor.
Deviations from the paper: those of H2O (`methods/h2o.py`); recent tokens are forced, one page of them by default, as
the current token's page has to stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltakv.field import A2SF
from deltakv.methods.evicting import drop_worst
from deltakv.methods.memory import Tally


@dataclass(frozen=True)
class A2SFEvictor:
    """Worth is attention, the older the less."""

    config: A2SF
    numbers: ClassVar[int] = 1

    def after_step(self, masses: Tensor, tally: Tally, seq_lens: Tensor, page_size: int) -> Tally:
        worth = tally.worth * self.config.forgetting + masses.sum(1)[..., None]
        return drop_worst(self.config, worth[..., 0], worth, tally, seq_lens, page_size)
