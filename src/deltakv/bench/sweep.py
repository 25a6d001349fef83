"""Step times over contexts and batches, and what follows: slopes, and where sparse begins to pay."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deltakv.bench.random_model import kv_shape
from deltakv.bench.step import STATIC, Entry, Settings, contender
from deltakv.config import Method

#: Methods that attend to everything.
DENSE = ("full", STATIC)

#: Of a device's free memory, what K and V may take: activations and captured graphs need the rest.
SHARE = 0.9


def sweep(
    model: Any,
    methods: Sequence[tuple[str, Method | str]],
    contexts: Sequence[int],
    batches: Sequence[int],
    settings: Settings,
    advance: Callable[[str], None] = lambda what: None,
    leave_out: Callable[[str], None] = lambda what: None,
) -> Iterator[Entry]:
    """Every method at every batch and context that fits the device. Each method is compiled once a batch.

    advance: told what is begun. leave_out: told of contexts that do not fit, and of a method and batch that ran out of
    memory all the same.
    """
    for batch in batches:
        fitting = [context for context in contexts if fits(model, batch, context + settings.room)]
        for context in sorted(set(contexts) - set(fitting)):
            leave_out(f"{context:,} tokens, batch {batch}")
        if not fitting:
            continue
        for name, method in methods:
            advance(f"{name}, batch {batch}")
            room = max(fitting) + settings.room
            try:
                with contender(model, name, method, batch, room, compiled=settings.compiled) as made:
                    for context in sorted(fitting):
                        yield made.measure([context] * batch, settings)
            except torch.OutOfMemoryError:
                leave_out(f"{name}, batch {batch}")


def fits(model: Any, batch: int, tokens: int) -> bool:
    """Whether K and V of that many rows fit beside the model."""
    heads, dim = kv_shape(model.config)
    need = 2 * batch * tokens * heads * dim * model.config.num_hidden_layers * model.dtype.itemsize
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return need <= SHARE * free
    return True


def trends(results: Sequence[dict[str, Any]], dense: Sequence[str] = DENSE) -> list[dict[str, Any]]:
    """What the times say of each method and batch. results: as in the JSON of `bench sweep`.

    slope_ms: what a step takes more for every 1,000 tokens of context, by least squares, None below two points.
    slope_ratio: that to the least of a dense method's. never_slower_from: the shortest measured context from which
    on the method is never slower than the best dense one, None if there is none; worst: by what share it is slower
    where it does worst.
    """
    found = []
    for batch in dict.fromkeys(result["batch"] for result in results):
        times = _times([result for result in results if result["batch"] == batch])
        best: dict[int, float] = {}
        for method, points in times.items():
            if _is_dense(method, dense):
                best |= {context: min(best.get(context, ms), ms) for context, ms in points.items()}
        slopes = {method: _slope(points) for method, points in times.items()}
        flat = min(
            (slope for method, slope in slopes.items() if _is_dense(method, dense) and slope is not None), default=None
        )
        for method, points in times.items():
            slope, both = slopes[method], sorted(points.keys() & best.keys())
            slower = [context for context in both if points[context] > best[context]]
            found.append(
                {
                    "batch": batch,
                    "method": method,
                    "slope_ms": slope,
                    "slope_ratio": slope / flat if slope is not None and flat else None,
                    "never_slower_from": next((c for c in both if not slower or c > max(slower)), None),
                    "worst": max((points[c] / best[c] - 1 for c in both), default=None),
                }
            )
    return found


def _is_dense(method: str, dense: Sequence[str]) -> bool:
    """Whatever its options are."""
    return method.split(":")[0] in dense


def _times(results: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Median milliseconds by method and context."""
    times: dict[str, dict[int, float]] = {}
    for result in results:
        times.setdefault(result["method"], {})[result["context"]] = result["median_ms"]
    return times


def _slope(points: dict[int, float]) -> float | None:
    if len(points) < 2:
        return None
    return 1000 * statistics.linear_regression(list(points), list(points.values())).slope
