"""Timed decode steps with K and V somewhere: what the GPU and the bus did meanwhile, and what was predicted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltakv.offload.forecast import Forecast
from deltakv.offload.timeline import Span, Timeline

#: Tokens of all rows together in one forward of the prompt.
PREFILL_TOKENS = 16384


@dataclass(frozen=True)
class Measured:
    """One variant. step_seconds: of each timed step. forecast: what was predicted, for variants in host memory.
    moved: bytes a step that crossed to the device. gpu_busy: the share of a step in which it computed, or None.
    seen: when copies to the device and kernels ran in one more step, on a GPU. host_bytes: taken there for the cache.
    failed: why there are no numbers, or ""."""

    name: str
    step_seconds: list[float]
    forecast: Forecast | None = None
    moved: int = 0
    gpu_busy: float | None = None
    device_peak: int | None = None
    host_bytes: int | None = None
    seen: Timeline | None = None
    failed: str = ""

    @property
    def seconds(self) -> float | None:
        """The median step."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        seconds = self.seconds
        predicted = self.forecast.timeline.seconds if self.forecast else None
        rate = self.moved / seconds if seconds and self.moved else None
        return {
            "variant": self.name,
            "step_seconds": seconds,
            "all_step_seconds": self.step_seconds,
            "predicted_seconds": predicted,
            "measured_to_predicted": seconds / predicted if seconds and predicted else None,
            "moved_bytes": self.moved,
            "moved_bytes_per_s": rate,
            "share_of_bus": rate / self.forecast.rates.bus if rate and self.forecast else None,
            "gpu_busy": self.gpu_busy,
            "device_peak_bytes": self.device_peak,
            "host_bytes": self.host_bytes,
            "forecast": self.forecast.numbers() if self.forecast else None,
            "failed": self.failed,
        }


def timelines(results: Sequence[Measured]) -> list[tuple[str, Timeline]]:
    """For the picture: of each variant that was predicted the prediction, and what a GPU did in a step."""
    found = []
    for result in results:
        if result.forecast is not None and result.seconds is not None:
            found.append(
                (f"{result.name} (measured {result.seconds * 1e3:,.1f} ms), predicted", result.forecast.timeline)
            )
            if result.seen is not None:
                found.append((f"{result.name}, as the profiler saw a step", result.seen))
    return found


class Clock:
    """Times steps on one device. layers: of the model, for the picture."""

    def __init__(self, device: torch.device, layers: int) -> None:
        self._device, self._layers = device, layers

    @property
    def cuda(self) -> bool:
        return self._device.type == "cuda"

    def steps(self, step: Callable[[], object], count: int) -> tuple[list[float], float | None, Timeline | None]:
        """Seconds of `count` steps, after one that warms up, and the GPU's busy share in one more: `count + 2`."""
        self.timed(step)
        taken = [self.timed(step) for _ in range(count)]
        return (taken, *self._watched(step))

    def timed(self, step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self._device)

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int | None]]:
        """Gives a function that says the most device memory that was taken inside, weights included."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        yield lambda: torch.cuda.max_memory_allocated(self._device) if self.cuda else None

    def _watched(self, step: Callable[[], object]) -> tuple[float | None, Timeline | None]:
        """One more step: the share in which the GPU computes, copies apart, and when what ran. None on a CPU."""
        if not self.cuda:
            self.timed(step)
            return None, None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            seconds = self.timed(step)
        events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return self._read(
            [(event.name, event.time_range.start * 1e-6, event.time_range.end * 1e-6) for event in events], seconds
        )

    def _read(self, events: Sequence[tuple[str, float, float]], seconds: float) -> tuple[float, Timeline]:
        """events: name, start and end in seconds of what the GPU did in a step of `seconds`."""
        kernels = _merged((start, end) for name, start, end in events if not name.startswith(("Memcpy", "Memset")))
        copies = _merged((start, end) for name, start, end in events if "HtoD" in name)
        first = min((start for start, _ in kernels + copies), default=0.0)
        length = max((end - first for _, end in kernels + copies), default=0.0) or 1.0

        def span(lane: str, what: str, start: float, end: float) -> Span:
            # Nobody has said which layer it was; layers are alike, so each has its share of the time.
            layer = min(int(self._layers * (start - first) / length), self._layers - 1)
            return Span(lane, what, layer, start - first, end - first)

        spans = [span("bus", "moved", *found) for found in copies] + [
            span("GPU", "kernels", *found) for found in kernels
        ]
        return sum(end - start for start, end in kernels) / seconds, Timeline(tuple(spans))


def _merged(spans: Any) -> list[tuple[float, float]]:
    """Without overlaps, in order; gaps of less than 2 us are none."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1] + 2e-6:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def prompt(config: Any, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, int64 [batch, length]."""
    return torch.randint(3, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def prefill(model: Any, cache: Any, ids: Tensor) -> None:
    """In chunks of so many columns that no more than `PREFILL_TOKENS` tokens are computed at once."""
    for chunk in ids.split(max(1, PREFILL_TOKENS // len(ids)), dim=1):
        model(chunk.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
