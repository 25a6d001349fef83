"""Times on a device, and the two rates that say how fast anything there could be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: Bytes that the bandwidth is measured on: several times a large cache.
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Times:
    """Milliseconds of repeated runs."""

    each: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the runs lies between."""
        if len(self.each) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.each, n=4)
        return low, high

    def numbers(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"median_ms": self.median, "quartiles_ms": list(self.quartiles), "runs": len(self.each)}


def timed(
    run: Callable[[], Any], device: torch.device, runs: int, warmup: int, before: Callable[[], Any] = lambda: None
) -> Times:
    """`runs` times of `run` after `warmup` that do not count; `before` each one, outside of its time.

    On a GPU by events around each run, and nothing waits in between: what the host does is hidden as far as the
    device has something to do.
    """
    for _ in range(warmup):
        before()
        run()
    if device.type != "cuda":
        seconds = []
        for _ in range(runs):
            before()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return Times([1e3 * second for second in seconds])
    torch.cuda.synchronize(device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    with no_syncs(device):
        for start_event, end_event in events:
            before()
            start_event.record()
            run()
            end_event.record()
    torch.cuda.synchronize(device)
    return Times([start_event.elapsed_time(end_event) for start_event, end_event in events])


@contextmanager
def no_syncs(device: torch.device) -> Iterator[None]:
    """A context in which waiting for the GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def copy_bandwidth(device: torch.device, runs: int = 10) -> float:
    """Bytes a second of a large copy within the device's memory, counting those read and those written."""
    count = COPY_BYTES[device.type]
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    source.fill_(1)  # memory that was never written may not be there
    times = timed(lambda: target.copy_(source), device, runs, warmup=2)
    return 2 * count / (times.median / 1e3)
