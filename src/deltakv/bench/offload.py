"""Decoding with K and V in host memory, several ways in one run, each with what was predicted of it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deltakv
from deltakv.config import Full
from deltakv.errors import InputError
from deltakv.offload.config import Host
from deltakv.offload.forecast import Forecast, forecast
from deltakv.offload.planner import FixedShare
from deltakv.offload.profile import Profile
from deltakv.offload.scheduler import LayerShape, Schedule
from deltakv.offload.timeline import Timeline

#: On the device; nothing beside the copies; transformers' own offloaded cache; copies beside the layers, all K and V
#: (what FlexGen does); KVPR as in the paper; KVPR in chunks.
VARIANTS = ("device", "naive", "transformers", "overlapped", "serial", "pipelined")
#: Those that share one cache in host memory.
HOSTED = ("naive", "overlapped", "serial", "pipelined")
#: Tokens of all rows together in one forward of the prompt.
PREFILL_TOKENS = 16384


@dataclass(frozen=True)
class Measured:
    """One variant. step_seconds: of each timed step. forecast: what was predicted, for variants in host memory.
    moved: bytes a step that crossed to the device. gpu_busy: the share of a step in which it computed, or None.
    failed: why there are no numbers, or ""."""

    name: str
    step_seconds: list[float]
    forecast: Forecast | None = None
    moved: int = 0
    gpu_busy: float | None = None
    device_peak: int | None = None
    failed: str = ""

    @property
    def seconds(self) -> float | None:
        """The median step."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        seconds = self.seconds
        predicted = self.forecast.timeline.seconds if self.forecast else None
        return {
            "variant": self.name,
            "step_seconds": seconds,
            "all_step_seconds": self.step_seconds,
            "predicted_seconds": predicted,
            "measured_to_predicted": seconds / predicted if seconds and predicted else None,
            "moved_bytes": self.moved,
            "moved_bytes_per_s": self.moved / seconds if seconds else None,
            "gpu_busy": self.gpu_busy,
            "device_peak_bytes": self.device_peak,
            "forecast": self.forecast.numbers() if self.forecast else None,
            "failed": self.failed,
        }


def hosts(base: Host) -> dict[str, Host]:
    """The variants in host memory, by name."""
    return {
        "naive": dataclasses.replace(base, schedule="pipelined", recompute=0.0, overlap=False),
        "overlapped": dataclasses.replace(base, schedule="pipelined", recompute=0.0),
        "serial": dataclasses.replace(base, schedule="serial"),
        "pipelined": dataclasses.replace(base, schedule="pipelined"),
    }


@dataclass
class OffloadBench:
    """One run on a model to which nothing is applied.

    shape, profile: of its layers. base: chunks, bits, pinning of all variants in host memory.
    batch, length: rows and tokens of the prompt. steps: timed ones, after one that warms up. say: hears which variant
    begins.
    """

    model: Any
    shape: LayerShape
    profile: Profile
    base: Host
    batch: int
    length: int
    steps: int
    say: Callable[[str], None] = lambda message: None

    def run(self, variants: Sequence[str]) -> list[Measured]:
        """Every variant in `variants`, in the order of `VARIANTS`. Raises `InputError` for an unknown one."""
        if unknown := [name for name in variants if name not in VARIANTS]:
            raise InputError(f"unknown variant {unknown[0]!r}; allowed are {', '.join(VARIANTS)}")
        results: dict[str, Measured] = {}
        with torch.no_grad():
            for name in ("device", "transformers"):
                if name in variants:
                    self.say(name)
                    results[name] = self._alone(name)
            if any(name in HOSTED for name in variants):
                results |= self._hosted([name for name in HOSTED if name in variants])
        return [results[name] for name in VARIANTS if name in results]

    def predicted(self, name: str) -> Forecast:
        """What a variant in host memory should take for its first timed step."""
        host = hosts(self.base)[name]
        tokens = None if host.recompute == "auto" else int(float(host.recompute) * self.length)
        layers = self.model.config.num_hidden_layers
        return forecast(self.shape, self.profile, host, layers, self.batch, self.length, tokens=tokens)

    def _alone(self, name: str) -> Measured:
        """A variant with a cache of its own, gone afterwards."""
        from transformers import DynamicCache

        try:
            with self._peak() as peak:
                if name == "device":
                    with deltakv.apply(self.model, Full()) as handle:
                        cache: Any = handle.new_cache(max_length=self.length + self.steps + 2)
                        self._prefill(cache)
                        taken, busy = self._decode(cache)
                else:
                    cache = DynamicCache(config=self.model.config, offloading=self.model.device.type == "cuda")
                    self._prefill(cache)
                    taken, busy = self._decode(cache)
            return Measured(name, taken, gpu_busy=busy, device_peak=peak())
        except torch.OutOfMemoryError as error:
            return Measured(name, [], failed=f"does not fit the device: {str(error).splitlines()[0]}")
        finally:
            cache = None
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _hosted(self, names: Sequence[str]) -> dict[str, Measured]:
        """All variants in host memory, on one cache: what lies there is the same for all."""
        forecasts = {name: self.predicted(name) for name in names}
        most = max(found.split.share for found in forecasts.values())
        widest = dataclasses.replace(self.base, recompute=most, overlap=True)
        results = {}
        with deltakv.apply(self.model, Full(), kv_device=widest) as handle:
            cache: Any = handle.new_cache(max_length=self.length + self.steps + 2)
            self._prefill(cache)
            for name in names:
                share = forecasts[name].split.share
                cache.host_rows.change(
                    hosts(self.base)[name], FixedShare(share, Schedule(hosts(self.base)[name].schedule))
                )
                with self._peak() as peak:
                    taken, busy = self._decode(cache)
                cache.crop(-(self.steps + 2))
                split = int(share * self.length)
                layers = self.model.config.num_hidden_layers
                moved = layers * self.batch * (split * self.shape.alpha + (self.length - split) * self.shape.kappa)
                results[name] = Measured(name, taken, forecasts[name], moved, busy, peak())
        return results

    def _prefill(self, cache: Any) -> None:
        made = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(3, vocabulary, (self.batch, self.length), generator=made)
        for chunk in ids.split(max(1, PREFILL_TOKENS // self.batch), dim=1):
            self.model(chunk.to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _decode(self, cache: Any) -> tuple[list[float], float | None]:
        """Seconds of `steps` steps, and the GPU's busy share in one more; `steps + 2` in all."""
        token = torch.full((self.batch, 1), 5, device=self.model.device)
        token, _ = self._step(cache, token)
        taken = []
        for _ in range(self.steps):
            token, seconds = self._step(cache, token)
            taken.append(seconds)
        return taken, self._busy(cache, token)

    def _step(self, cache: Any, token: Tensor) -> tuple[Tensor, float]:
        start = time.perf_counter()
        logits = self.model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        self._wait()
        return token, time.perf_counter() - start

    def _busy(self, cache: Any, token: Tensor) -> float | None:
        """The share of one more step in which the GPU computes; copies do not count. None on a CPU."""
        if self.model.device.type != "cuda":
            self._step(cache, token)
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            _, seconds = self._step(cache, token)
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in seen.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        )
        busy, end = 0.0, float("-inf")
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return busy * 1e-6 / seconds

    @contextmanager
    def _peak(self) -> Iterator[Callable[[], int | None]]:
        """Gives a function that says the most device memory that was taken inside, weights included."""
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        yield lambda: torch.cuda.max_memory_allocated(self.model.device) if cuda else None

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def timelines(results: Sequence[Measured]) -> list[tuple[str, Timeline]]:
    """For the picture: the predicted timeline of each variant that has one, with what was measured."""
    return [
        (f"{result.name} (measured {result.seconds * 1e3:,.1f} ms)", result.forecast.timeline)
        for result in results
        if result.forecast is not None and result.seconds is not None
    ]
