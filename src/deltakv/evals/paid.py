"""What a step may cost while `calibrate` searches, and the budget that this leaves to a plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from deltakv.config import Delta
from deltakv.plan import LayerPlan, Role


class Cost(Protocol):
    """What a step costs; more with a larger budget, or the same. `deltakv.bench.layer_times.LayerTimes` is one, too."""

    def step(self, full: int, select: int, reuse: int, length: int, budget: int) -> float:
        """full, select, reuse: how many layers, WINDOW ones among the last, for they read as much; length: tokens of a
        row; budget: those that a REUSE layer reads."""
        ...


@dataclass(frozen=True)
class AttendedTokens:
    """Tokens that a row attends to, summed over layers."""

    def step(self, full: int, select: int, reuse: int, length: int, budget: int) -> float:
        return (full + select) * length + reuse * budget


@dataclass(frozen=True)
class Paid:
    """What a step may cost: no more than under `plan` with `budget`. lengths: of a row, the shortest and the longest;
    it holds at each, and between, for a cost is a straight line there."""

    cost: Cost
    plan: LayerPlan
    budget: int
    lengths: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.plan)

    def of(self, plan: LayerPlan, length: int, budget: int) -> float:
        """What a step costs under another plan."""
        full, select = len(plan.layers(Role.FULL)), len(plan.layers(Role.SELECT))
        return self.cost.step(full, select, len(plan) - full - select, length, budget)

    def readings(self, base: Delta, counts: Iterable[int]) -> list[int]:
        """Of numbers of layers that read everything, those that leave the others a budget."""
        return [count for count in counts if 0 < count < self.depth and self.fitted(base, count) is not None]

    def fitted(self, base: Delta, select: int, full: int = 0) -> Delta | None:
        """`base` with the budget that this leaves if so many layers SELECT and are FULL, fewer than there are; None if
        that is less than sinks and two pages, or nothing less than all."""
        most = [self.of(self.plan, length, self.budget) for length in self.lengths]
        reuse = self.depth - select - full

        def too_many(pages: int) -> bool:
            costs = (self.cost.step(full, select, reuse, length, pages * base.page_size) for length in self.lengths)
            return any(cost > paid for cost, paid in zip(costs, most, strict=True))

        all_pages = -(-min(self.lengths) // base.page_size)
        pages = bisect_left(range(1, all_pages + 1), True, key=too_many)
        if pages < base.sink_pages + 2 or pages == all_pages:
            return None
        recent = min(base.recent_pages, max(1, (pages - base.sink_pages) // 2))
        return replace(base, budget=pages * base.page_size, recent=recent * base.page_size)
