"""What a step may cost while `calibrate` searches, and the budget that this leaves to a plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from deltakv.config import Method
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
    it holds at each, and between, for a cost is a straight line there (but for part of a page, where layers pick for
    themselves)."""

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

    def readings(self, base: Method, counts: Iterable[int]) -> list[int]:
        """Of numbers of layers that read everything, those that leave the others a budget. None of them may, where
        layers pick for themselves."""
        least = 0 if base.attends_to_own_pick else 1
        return [n for n in counts if least <= n < self.depth and self.reading(base, n) is not None]

    def reading(self, base: Method, count: int, full: int = 0) -> Method | None:
        """`base` with the budget that this leaves if so many layers read everything, `full` of them without picking."""
        if base.attends_to_own_pick:
            return self.fitted(base, self.depth - count, count)
        return self.fitted(base, count - full, full)

    def fitted(self, base: Method, select: int, full: int = 0) -> Method | None:
        """`base` with the budget that this leaves if so many layers SELECT and are FULL; None if that is too small for
        it, or nothing less than all."""
        most = [self.of(self.plan, length, self.budget) for length in self.lengths]
        reuse = self.depth - select - full

        def step(pages: int, length: int) -> float:
            if not base.attends_to_own_pick:
                return self.cost.step(full, select, reuse, length, pages * base.page_size)
            sized = base.at_budget(pages)  # its layers read their picks, and what they look at for them
            return 0 if sized is None else self.cost.step(full, 0, select, length, sized.select_tokens(length))

        def too_many(pages: int) -> bool:
            return any(step(pages, length) > paid for length, paid in zip(self.lengths, most, strict=True))

        all_pages = -(-min(self.lengths) // base.page_size)
        pages = bisect_left(range(1, all_pages + 1), True, key=too_many)
        return None if pages in (0, all_pages) else base.at_budget(pages)
