"""Decode speed: warm, in one process, runners taking turns, so that a noisy neighbour hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltakv.bench.runners import Runner

#: Steps of a turn, after one that is not counted: hooks, caches and branch predictors are warm by then.
BLOCK = 8


@dataclass(frozen=True)
class Speed:
    """Decode steps of one runner. attended_tokens: per step and row, summed over layers; None for stock."""

    step_seconds: list[float]
    batch: int
    attended_tokens: float | None
    full_tokens: float | None

    @property
    def tokens_per_s(self) -> float:
        """Of the whole batch, at the median step."""
        return self.batch / statistics.median(self.step_seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of tokens per second."""
        if len(self.step_seconds) < 2:
            return (self.tokens_per_s, self.tokens_per_s)
        quarter, _, three_quarters = statistics.quantiles(self.step_seconds, n=4)
        return (self.batch / three_quarters, self.batch / quarter)


def measure_speed(
    model: Any,
    runners: Sequence[Runner],
    first: Tensor,
    steps: int,
    advance: Callable[[int], None] = lambda turns: None,
) -> list[Speed]:
    """At least `steps` timed decode steps of each runner, in turns of `BLOCK` from the same place.

    first: int64 [batch, 1], the token that each row decodes from. Greedy from there.
    advance: hears of each turn done; there are `turns(steps)` for each runner.
    """
    seconds: list[list[float]] = [[] for _ in runners]
    counts: list[list[tuple[float, float]]] = [[] for _ in runners]
    for turn in range(turns(steps)):
        # Every second round backwards, so that nobody always runs after the same neighbour.
        order = range(len(runners)) if turn % 2 == 0 else reversed(range(len(runners)))
        for index in order:
            with runners[index].open() as handle:
                taken = _decode(model, runners[index].cache, first, BLOCK + 1)
                if handle is not None:
                    counts[index].append((handle.stats.attended_per_row_step, handle.stats.full_per_row_step))
            runners[index].rewind()
            # The first turn of all warms everything up.
            seconds[index] += taken[1:] if turn else []
            advance(1)
    return [
        Speed(
            taken,
            first.shape[0],
            statistics.fmean(attended for attended, _ in counted) if counted else None,
            statistics.fmean(full for _, full in counted) if counted else None,
        )
        for taken, counted in zip(seconds, counts, strict=True)
    ]


def turns(steps: int) -> int:
    """Turns of one runner that `steps` timed steps take, with the one that only warms up."""
    return -(-steps // BLOCK) + 1


def _decode(model: Any, cache: Any, first: Tensor, steps: int) -> list[float]:
    token, seconds = first, []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        if token.is_cuda:
            torch.cuda.synchronize(token.device)
        seconds.append(time.perf_counter() - start)
    return seconds
