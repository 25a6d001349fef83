"""Full attention on the same machinery: every layer FULL, so nothing is ever picked."""

from __future__ import annotations

from dataclasses import dataclass

from deltakv.config import Full
from deltakv.methods.base import Picks, SoftmaxStats


@dataclass(frozen=True)
class FullSelector:
    """Never asked: the plan has no SELECT layer."""

    config: Full

    def pick(self, stats: SoftmaxStats) -> Picks:
        raise AssertionError("full attention has no SELECT layer")
