"""Decoding several batches column by column, with the weights in host memory beside K, V and X."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deltakv
from deltakv.bench.offload import hosts
from deltakv.bench.offload_steps import Clock, Measured, prefill, prompt
from deltakv.config import Full
from deltakv.errors import InputError
from deltakv.integrations.hf.column import Column as ColumnSteps
from deltakv.integrations.hf.shapes import layer_shape, layer_weights
from deltakv.offload import memory
from deltakv.offload.ahead import page_lock
from deltakv.offload.config import Host
from deltakv.offload.forecast import Forecast, forecast
from deltakv.offload.planner import FixedShare
from deltakv.offload.profile import Profile
from deltakv.offload.scheduler import Column, LayerShape, Schedule

#: The same schedule without recomputation; with it, as in the paper; and in chunks.
VARIANTS = ("overlapped", "serial", "pipelined")


@dataclass
class ThroughputBench:
    """As `OffloadBench`, for `batches` batches of `batch` rows each that take turns in every layer."""

    model: Any
    profile: Profile
    base: Host
    batches: int
    batch: int
    length: int
    steps: int
    say: Callable[[str], None] = lambda message: None
    found: Callable[[list[Measured]], None] = lambda results: None
    pin_seconds: float = 0.0
    pinned_bytes: int = 0

    def run(self, variants: Sequence[str]) -> list[Measured]:
        """Every variant in `variants`, in the order of `VARIANTS`. Raises `InputError` for an unknown one, and
        `OffloadError` if the host has no room."""
        if unknown := [name for name in variants if name not in VARIANTS]:
            raise InputError(
                f"variant {unknown[0]!r} does not run with weights in host memory; allowed are {', '.join(VARIANTS)}"
            )
        names = [name for name in VARIANTS if name in variants]
        forecasts = {name: self.predicted(name) for name in names}
        most = max(found.split.share for found in forecasts.values())
        widest = dataclasses.replace(hosts(self.base)["pipelined"], recompute=most)
        self._page_lock(most)
        results: list[Measured] = []
        with (
            torch.no_grad(),
            deltakv.apply(self.model, Full(), kv_device=widest, fuse=False) as handle,
        ):
            self.say("the prompts")
            caches: list[Any] = []
            for number in range(self.batches):
                caches.append(handle.new_cache(max_length=self.length + self.steps + 2))
                prefill(self.model, caches[-1], prompt(self.model.config, self.batch, self.length, seed=number))
            self.say("weights to the host")
            column = ColumnSteps(handle, caches)
            if self._clock.cuda:
                torch.cuda.empty_cache()
            for name in names:
                self.say(name)
                results.append(self._variant(name, column, forecasts[name]))
                self.found(results)
            column.remove()
        return results

    @property
    def column(self) -> Column:
        first, rest = layer_weights(self.model.config, self.model.dtype)
        return Column(batches=self.batches, first_bytes=first, rest_bytes=rest)

    @property
    def shape(self) -> LayerShape:
        return layer_shape(self.model.config, self.model.dtype, self.base.bits)

    @property
    def _layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def _clock(self) -> Clock:
        return Clock(self.model.device, self._layers)

    def predicted(self, name: str) -> Forecast:
        """What a variant should take for its first timed step, all batches together."""
        host = hosts(self.base)[name]
        tokens = None if host.recompute == "auto" else int(float(host.recompute) * self.length)
        return forecast(
            self.shape, self.profile, host, self._layers, self.batch, self.length, tokens=tokens, column=self.column
        )

    def _variant(self, name: str, column: ColumnSteps, found: Forecast) -> Measured:
        host, share, shape = hosts(self.base)[name], found.split.share, self.shape
        for cache in column.caches:
            cache.host_rows.change(host, FixedShare(share, Schedule(host.schedule)))
        column.share_chunks()
        tokens = [torch.full((self.batch, 1), 5, device=self.model.device) for _ in column.caches]
        with self._clock.peak() as peak:
            taken, busy, seen = self._clock.steps(lambda: self._step(column, tokens), self.steps)
        for cache in column.caches:
            cache.crop(-(self.steps + 2))
        split = int(share * self.length)
        cached = self.batches * self.batch * (split * shape.alpha + (self.length - split) * shape.kappa)
        moved = self._layers * (column.weight_bytes + cached)
        host_bytes = self._layers * column.weight_bytes + sum(cache.host_rows.host_bytes for cache in column.caches)
        return Measured(name, taken, found, moved, busy, peak(), host_bytes, seen)

    def _step(self, column: ColumnSteps, tokens: list[Tensor]) -> None:
        for index, logits in enumerate(column.step(tokens)):
            tokens[index] = logits[:, -1].argmax(-1, keepdim=True)

    def _page_lock(self, share: float) -> None:
        if not (self._clock.cuda and self.base.pinned):
            return
        longest, x = self.length + self.steps + 2, int(share * (self.length + self.steps + 2))
        cached = memory.slabs_bytes(self.batch * self.shape.kappa, longest)
        cached += memory.slabs_bytes(self.batch * self.shape.alpha, x) if x else 0
        weights = memory.slabs_bytes(1, self.column.first_bytes + self.column.rest_bytes + (1 << 16))
        self.say("page-locking host memory")
        self.pinned_bytes = self._layers * (self.batches * cached + weights)
        self.pin_seconds = page_lock(self.pinned_bytes, say=self.say)
