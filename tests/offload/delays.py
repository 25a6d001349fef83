"""Lanes that copy as late as they may, when somebody waits for it: who does not wait reads what was there before. And
a bus and host memory that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from deltakv.errors import OffloadError
from deltakv.offload.lanes import InstantLane, Lanes
from deltakv.offload.memory import HostMemory


class LateLane:
    """A lane whose work waits until a mark behind it is waited for, as a slow bus's would."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] = []
        self._done = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._queue.append(lambda: copy(target, source))

    def mark(self) -> Any:
        return self, len(self._queue)

    def wait(self, mark: Any) -> None:
        if mark is not None:
            self._queue.append(lambda: reach(mark))

    def settle(self) -> None:
        self.run(len(self._queue))

    def keep(self, tensor: Tensor) -> None:
        pass

    def run(self, end: int) -> None:
        while self._done < end:
            work, self._done = self._queue[self._done], self._done + 1
            work()

    @property
    def unfinished(self) -> int:
        return len(self._queue) - self._done


class EagerCompute(InstantLane):
    """The model's own lane: PyTorch on a CPU computes at once, but waits for late copies first."""

    def wait(self, mark: Any) -> None:
        if mark is not None:
            reach(mark)


def copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def reach(mark: Any) -> None:
    lane, end = mark
    lane.run(end)


def late_lanes(_: torch.device, overlap: bool) -> Lanes:
    return Lanes(LateLane(), LateLane(), EagerCompute())


def late_store(_: torch.device, overlap: bool) -> Lanes:
    """Loads come at once: they find old bytes if they do not wait for what is stored."""
    return Lanes(EagerCompute(), LateLane(), EagerCompute())


class FailingLane(InstantLane):
    """Fails at the copy with that number, once."""

    def __init__(self, at: int) -> None:
        self.left = at

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise OffloadError("copying between host and device failed: the bus is on fire")
        super().copy(target, source)


@contextmanager
def refusing(after: int) -> Iterator[None]:
    """Host memory is refused after that many slabs."""
    slab, left = HostMemory.slab, iter(range(after))

    def counted(host: HostMemory, nbytes: int) -> Tensor:
        if next(left, None) is None:
            raise OffloadError("out of host memory: so a test wants it")
        return slab(host, nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostMemory, "slab", counted)
        yield
