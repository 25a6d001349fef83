"""Decoding several batches column by column, with the weights in host memory beside K, V and X."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import deltakv
from deltakv.bench.offload_run import OffloadRun, hosts
from deltakv.bench.offload_steps import Measured, prefill, prompt
from deltakv.config import Full
from deltakv.integrations.hf.column import Column as ColumnSteps
from deltakv.integrations.hf.shapes import layer_weights
from deltakv.offload import memory
from deltakv.offload.forecast import Forecast
from deltakv.offload.planner import FixedShare
from deltakv.offload.scheduler import Column, Schedule

#: The same schedule without recomputation; with it, as in the paper; and in chunks.
VARIANTS = ("overlapped", "serial", "pipelined")


@dataclass
class ThroughputBench(OffloadRun):
    """`batches` batches of `batch` rows each, which take turns in every layer."""

    known: ClassVar[Sequence[str]] = VARIANTS
    usual: ClassVar[Sequence[str]] = VARIANTS

    batches: int = field(kw_only=True)

    def run(self, variants: Sequence[str]) -> list[Measured]:
        """See `OffloadRun.run`. Raises `OffloadError` if the host has no room."""
        names = self.ordered(variants)
        forecasts = {name: self.predicted(name) for name in names}
        most = max(found.split.share for found in forecasts.values())
        widest = dataclasses.replace(hosts(self.base)["pipelined"], recompute=most)
        self._page_lock(names[0], most)
        results: list[Measured] = []
        with (
            torch.no_grad(),
            deltakv.apply(self.model, Full(), kv_device=widest, fuse=False) as handle,
        ):
            self.say("the prompts")
            caches: list[Any] = []
            for number in range(self.batches):
                caches.append(handle.new_cache(max_length=self._longest))
                prefill(self.model, caches[-1], prompt(self.model.config, self.batch, self.length, seed=number))
            self.say("weights to the host")
            with ColumnSteps(handle, caches) as column:
                if self._clock.cuda:
                    torch.cuda.empty_cache()
                for name in names:
                    self.say(name)
                    results.append(self._variant(name, column, forecasts[name]))
                    self.found(results)
        return results

    @property
    def column(self) -> Column:
        first, rest = layer_weights(self.model.config, self.model.dtype)
        return Column(batches=self.batches, first_bytes=first, rest_bytes=rest)

    def _variant(self, name: str, column: ColumnSteps, found: Forecast) -> Measured:
        host, share = hosts(self.base)[name], found.split.share
        for cache in column.caches:
            cache.host_rows.change(host, FixedShare(share, Schedule(host.schedule)))
        column.share_chunks()
        tokens = [torch.full((self.batch, 1), 5, device=self.model.device) for _ in column.caches]
        with self._clock.peak() as peak:
            taken, busy, seen = self._clock.steps(lambda: self._step(column, tokens), self.steps)
        for cache in column.caches:
            cache.crop(-(self.steps + 2))
        moved = self._layers * column.weight_bytes + self._moved(name, share)
        host_bytes = self._layers * column.weight_bytes + sum(cache.host_rows.host_bytes for cache in column.caches)
        return Measured(name, taken, found, moved, busy, peak(), host_bytes, seen)

    def _step(self, column: ColumnSteps, tokens: list[Tensor]) -> None:
        for index, logits in enumerate(column.step(tokens)):
            tokens[index] = logits[:, -1].argmax(-1, keepdim=True)

    def _weight_slabs(self) -> int:
        return memory.slabs_bytes(1, self.column.first_bytes + self.column.rest_bytes + (1 << 16))
