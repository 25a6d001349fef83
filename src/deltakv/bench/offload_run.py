"""What every run of `deltakv bench offload` is made of: one model, one prompt's size, variants, and what they cost."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deltakv.bench.offload_steps import Clock, Measured
from deltakv.errors import InputError
from deltakv.integrations.hf.shapes import layer_shape
from deltakv.offload import memory
from deltakv.offload.ahead import page_lock
from deltakv.offload.config import Host
from deltakv.offload.forecast import Forecast, forecast
from deltakv.offload.profile import Profile
from deltakv.offload.scheduler import ROW, Column, LayerShape


def hosts(base: Host) -> dict[str, Host]:
    """The variants in host memory, by name."""
    moving = dataclasses.replace(base, schedule="pipelined", recompute=0.0)
    return {
        "naive": dataclasses.replace(moving, overlap=False),
        "overlapped": moving,
        "serial": dataclasses.replace(base, schedule="serial"),
        "pipelined": dataclasses.replace(base, schedule="pipelined"),
        "int8": dataclasses.replace(moving, bits=8),
        "int4": dataclasses.replace(moving, bits=4),
    }


def layer_slabs(shape: LayerShape, batch: int, length: int, recomputed: int) -> int:
    """Bytes of host memory that one layer's K and V of `length` tokens a row take, and X of the first `recomputed`."""
    return memory.slabs_bytes(batch * shape.kappa, length) + memory.slabs_bytes(batch * shape.alpha, recomputed)


@dataclass
class OffloadRun(ABC):
    """One run on a model to which nothing is applied.

    profile: of its layers. base: chunks, bits, pinning of all variants in host memory.
    batch, length: rows and tokens of the prompt. steps: timed ones, after one that warms up. say: hears which variant
    begins. found: hears of all results after each variant, so that none is lost with a later one.
    pin_seconds, pinned_bytes: what was page-locked for the run, and how long that took.
    """

    #: The variants that it knows, in the order of results; those that run if nothing is said.
    known: ClassVar[Sequence[str]]
    usual: ClassVar[Sequence[str]]

    model: Any
    profile: Profile
    base: Host
    batch: int
    length: int
    steps: int
    say: Callable[[str], None] = lambda message: None
    found: Callable[[list[Measured]], None] = lambda results: None
    pin_seconds: float = 0.0
    pinned_bytes: int = 0

    @abstractmethod
    def run(self, variants: Sequence[str]) -> list[Measured]:
        """Every variant in `variants`, in the order of `known`. Raises `InputError` for an unknown one."""

    @classmethod
    def ordered(cls, variants: Sequence[str]) -> list[str]:
        """Those variants, each once, in the order of `known`. Raises `InputError` for an unknown one."""
        if unknown := [name for name in variants if name not in cls.known]:
            raise InputError(f"unknown variant {unknown[0]!r}; allowed are {', '.join(cls.known)}")
        return [name for name in cls.known if name in variants]

    @property
    def column(self) -> Column:
        """Batches that take turns in a layer, and its weights, if they cross too."""
        return ROW

    def shape(self, name: str) -> LayerShape:
        return layer_shape(self.model.config, self.model.dtype, hosts(self.base)[name].bits)

    def predicted(self, name: str) -> Forecast:
        """What a variant in host memory should take for its first timed step, all batches together."""
        host = hosts(self.base)[name]
        tokens = None if host.recompute == "auto" else int(float(host.recompute) * self.length)
        sizes = (self._layers, self.batch, self.length)
        return forecast(self.shape(name), self.profile, host, *sizes, tokens=tokens, column=self.column)

    @property
    def _layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def _longest(self) -> int:
        """Tokens of a row at the end: `Clock.steps` takes two steps more than are timed."""
        return self.length + self.steps + 2

    @property
    def _clock(self) -> Clock:
        return Clock(self.model.device, self._layers)

    def _moved(self, name: str, share: float) -> int:
        """Bytes of X, K and V that cross in a step of a variant which recomputes that share of a row."""
        shape, split = self.shape(name), int(share * self.length)
        rows = self.column.batches * self.batch
        return self._layers * rows * (split * shape.alpha + (self.length - split) * shape.kappa)

    def _page_lock(self, name: str, share: float) -> None:
        """Takes the memory of such a variant's caches ahead, and notes how long that took."""
        if not (self._clock.cuda and self.base.pinned):
            return
        cached = layer_slabs(self.shape(name), self.batch, self._longest, int(share * self._longest))
        needed = self._layers * (self.column.batches * cached + self._weight_slabs())
        self.say("page-locking host memory")
        kept = memory.pooled_bytes()
        self.pin_seconds += page_lock(needed, say=self.say)
        self.pinned_bytes += max(needed - kept, 0)

    def _weight_slabs(self) -> int:
        """Bytes of host memory that a layer's weights take."""
        return 0
