"""Decoding with K and V in host memory, several ways in one run, each with what was predicted of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import deltakv
from deltakv.bench.offload_run import OffloadRun, hosts
from deltakv.bench.offload_steps import Measured, prefill, prompt
from deltakv.bench.random_model import kv_shape
from deltakv.config import Full
from deltakv.errors import OffloadError
from deltakv.offload import memory
from deltakv.offload.ahead import page_lock
from deltakv.offload.planner import FixedShare
from deltakv.offload.scheduler import Schedule

#: On the device; nothing beside the copies; transformers' own offloaded cache; copies beside the layers, all K and V
#: (what FlexGen does); KVPR as in the paper; KVPR in chunks; all K and V in 8 bits, and in 4.
VARIANTS = ("device", "naive", "transformers", "overlapped", "serial", "pipelined", "int8", "int4")
#: What runs if nothing is said.
DEFAULT = VARIANTS[:6]


@dataclass
class OffloadBench(OffloadRun):
    """One batch whose K and V are in host memory, or elsewhere for comparison; its weights are on the device."""

    known: ClassVar[Sequence[str]] = VARIANTS
    usual: ClassVar[Sequence[str]] = DEFAULT

    _results: dict[str, Measured] = field(default_factory=dict)

    def run(self, variants: Sequence[str]) -> list[Measured]:
        """See `OffloadRun.run`; those with caches of their own run last. One that does not fit is a result that says
        so."""
        chosen = self.ordered(variants)
        by_bits: dict[int, list[str]] = {}
        for name, host in hosts(self.base).items():  # those with as many bits share one cache
            if name in chosen:
                by_bits.setdefault(host.bits, []).append(name)
        with torch.no_grad():
            for names in by_bits.values():
                self._attempt(names, lambda names=names: self._hosted(names))  # type: ignore[misc]
            if self._clock.cuda:
                memory.empty_pool()
            for name, run in (("device", self._device), ("transformers", self._transformers)):
                if name in chosen:
                    self.say(name)
                    # What transformers page-locks is refused by CUDA itself, in words of its own.
                    self._attempt([name], run, RuntimeError)
        return self._sorted()

    def _sorted(self) -> list[Measured]:
        return [self._results[name] for name in VARIANTS if name in self._results]

    def _note(self, result: Measured) -> None:
        self._results[result.name] = result
        self.found(self._sorted())

    def _attempt(
        self, names: Sequence[str], run: Callable[[], None], refusal: type[Exception] = torch.OutOfMemoryError
    ) -> None:
        """What does not fit is noted, and the others go on."""
        try:
            run()
        except (refusal, OffloadError) as error:
            for name in names:
                if name not in self._results:
                    self._note(Measured(name, [], failed=f"does not fit: {str(error).splitlines()[0]}"))
        if self._clock.cuda:
            torch.cuda.empty_cache()

    def _device(self) -> None:
        with self._clock.peak() as peak, deltakv.apply(self.model, Full()) as handle:
            cache = handle.new_cache(max_length=self._longest)
            prefill(self.model, cache, prompt(self.model.config, self.batch, self.length))
            taken, busy, _ = self._decode(cache)
            self._note(Measured("device", taken, gpu_busy=busy, device_peak=peak()))

    def _transformers(self) -> None:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config, offloading=self._clock.cuda)
        with self._clock.peak() as peak:
            self._fill(cache)
            taken, busy, _ = self._decode(cache)
            self._note(Measured("transformers", taken, gpu_busy=busy, device_peak=peak()))
        del cache
        if self._clock.cuda:
            memory.empty_pool()

    def _fill(self, cache: Any) -> None:
        """On a GPU at random: from prompt to prompt that cache would page-lock memory of every size anew."""
        ids = prompt(self.model.config, self.batch, self.length)
        if not self._clock.cuda:
            prefill(self.model, cache, ids)
            return
        prefill(self.model, cache, ids[:, :1])  # its layers then know where they are
        self._clock.wait()
        heads, dim = kv_shape(self.model.config)
        room = self.batch * heads * (self.length + self.steps + 3) * dim * self.model.dtype.itemsize
        size = 1 << (room - 1).bit_length()  # what torch makes of it
        page_lock((2 * self._layers + 4) * size, size)
        made = torch.randn((self.batch, heads, self.length, dim), dtype=self.model.dtype, device=self.model.device)
        for layer in cache.layers:
            layer.keys, layer.values = (_in_host(made, room) for _ in range(2))
        cache.layers[0].prefetch()  # as the last layer of a step before would have
        self._clock.wait()

    def _hosted(self, names: Sequence[str]) -> None:
        """Variants in host memory, on one cache: what lies there is the same for all."""
        forecasts = {name: self.predicted(name) for name in names}
        most = max(found.split.share for found in forecasts.values())
        widest = dataclasses.replace(hosts(self.base)[names[0]], schedule="pipelined", recompute=most, overlap=True)
        self._page_lock(names[0], most)
        with deltakv.apply(self.model, Full(), kv_device=widest) as handle:
            cache: Any = handle.new_cache(max_length=self._longest)
            self.say("the prompt")
            prefill(self.model, cache, prompt(self.model.config, self.batch, self.length))
            for name in names:
                self.say(name)
                host, share = hosts(self.base)[name], forecasts[name].split.share
                cache.host_rows.change(host, FixedShare(share, Schedule(host.schedule)))
                with self._clock.peak() as peak:
                    taken, busy, seen = self._decode(cache)
                cache.crop(-(self.steps + 2))
                moved, host_bytes = self._moved(name, share), cache.host_rows.host_bytes
                self._note(Measured(name, taken, forecasts[name], moved, busy, peak(), host_bytes, seen))
            cache.reset()

    def _decode(self, cache: Any) -> Any:
        """See `Clock.steps`: each step goes on with the token of the one before."""
        token = [torch.full((self.batch, 1), 5, device=self.model.device)]
        return self._clock.steps(lambda: self._step(cache, token), self.steps)

    def _step(self, cache: Any, token: list[Tensor]) -> None:
        """token: one tensor, int64 [batch, 1], replaced by the next one."""
        logits = self.model(token[0], past_key_values=cache, use_cache=True).logits
        token[0] = logits[:, -1].argmax(-1, keepdim=True)


def _in_host(made: Tensor, room: int) -> Tensor:
    """A page-locked copy, in memory that has room for `room` bytes."""
    held = torch.empty(room // made.element_size(), dtype=made.dtype, pin_memory=True)[: made.numel()]
    return held.view(made.shape).copy_(made, non_blocking=True)
