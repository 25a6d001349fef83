"""Which share of its tokens each layer recomputes at which length: the scheduler's answers, kept by length bucket."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from deltakv.offload.scheduler import ROW, Column, LayerShape, Rates, Schedule, Split, best_split


class Splitter(Protocol):
    """Says how many tokens to recompute. schedule: in which order things then cross the bus."""

    schedule: Schedule

    def tokens(self, layer: int, batch: int, length: int) -> int:
        """Of `length` tokens a row, the first so many."""
        ...

    def most(self, layer: int, batch: int, length: int) -> int:
        """The most that `tokens` says for any length up to this one."""
        ...


class FixedShare:
    """The same share at every length and in every layer; 0 moves everything. share: in [0, 1]."""

    def __init__(self, share: float, schedule: Schedule) -> None:
        self.share, self.schedule = share, schedule

    def tokens(self, layer: int, batch: int, length: int) -> int:
        return math.floor(self.share * length)

    def most(self, layer: int, batch: int, length: int) -> int:
        return self.tokens(layer, batch, length)


class Planner:
    """The best split for each layer, batch and length bucket.

    shapes: one a layer. rates: what the machine does for such a layer, batch and length.
    A bucket's share is the best one at the bucket's end.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        rates: Callable[[LayerShape, int, int], Rates],
        schedule: Schedule,
        column: Column = ROW,
    ) -> None:
        self.shapes, self.schedule, self.column = tuple(shapes), schedule, column
        self._rates = rates
        self._known: dict[tuple[LayerShape, int, int], Split] = {}

    def split(self, layer: int, batch: int, length: int) -> Split:
        """The best split of exactly this length."""
        key = (self.shapes[layer], batch, length)
        if key not in self._known:
            rates = self._rates(*key)
            self._known[key] = best_split(key[0], rates, batch, length, self.schedule, self.column)
        return self._known[key]

    def tokens(self, layer: int, batch: int, length: int) -> int:
        return math.floor(self.split(layer, batch, bucket_end(length)).share * length) if length else 0

    def most(self, layer: int, batch: int, length: int) -> int:
        ends = [*itertools.takewhile(lambda end: end < length, bucket_ends()), length]
        return max(self.tokens(layer, batch, end) for end in ends)


def bucket_ends() -> itertools.chain[int]:
    """16, 24, 32, 48, 64, ...: powers of two and halfway between."""
    return itertools.chain.from_iterable((1 << power, 3 << power - 1) for power in itertools.count(4))


def bucket_end(length: int) -> int:
    """The end of the bucket that `length` is in."""
    return next(end for end in bucket_ends() if end >= length)
