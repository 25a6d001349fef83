"""Lanes: queues of work that run side by side, and the marks by which one waits for another.

On a GPU a lane is a CUDA stream and a mark an event, so the host waits for nothing. On a machine whose host and device
are one memory there is a single lane, everything is done at once, and marks mean nothing: the code that uses lanes is
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deltakv.errors import OffloadError


class Lane(Protocol):
    """A queue that works in order."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies once all that was queued before is done. Raises `OffloadError`."""
        ...

    def mark(self) -> Any:
        """A mark behind everything that is queued now."""
        ...

    def wait(self, mark: Any) -> None:
        """What is queued from now on waits for `mark`, of this lane or another. None is no mark."""
        ...

    def settle(self) -> None:
        """The host waits until all is done. Raises `OffloadError` if something failed."""
        ...

    def keep(self, tensor: Tensor) -> None:
        """This lane uses the memory of `tensor`: it must not be given to others before the lane is through."""
        ...


class InstantLane:
    """Does everything at once: host and device are one memory."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        with failing_as("copying"):
            target.copy_(source)

    def mark(self) -> None:
        return None

    def wait(self, mark: Any) -> None:
        pass

    def settle(self) -> None:
        pass

    def keep(self, tensor: Tensor) -> None:
        pass


class StreamLane:
    """A CUDA stream; without one, whichever is current: the one that the model computes on."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device, self._own = device, stream

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream(self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with failing_as("copying"), torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            self._stream.wait_event(mark)

    def settle(self) -> None:
        with failing_as("copying"):
            self._stream.synchronize()

    def keep(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            tensor.record_stream(self._stream)


@dataclass(frozen=True)
class Lanes:
    """load: host to device. store: device to host. compute: the model's own work."""

    load: Lane
    store: Lane
    compute: Lane


def lanes_of(device: torch.device, overlap: bool = True) -> Lanes:
    """The lanes of a device. overlap: copies have lanes of their own; else they queue up with the model's work."""
    if device.type != "cuda":
        lane = InstantLane()
        return Lanes(lane, lane, lane)
    compute = StreamLane(device)
    if not overlap:
        return Lanes(compute, compute, compute)
    with torch.cuda.device(device):
        return Lanes(
            StreamLane(device, torch.cuda.Stream(device)), StreamLane(device, torch.cuda.Stream(device)), compute
        )


class failing_as:
    """A context in which a failure of the runtime becomes an `OffloadError`. what: the work, for the message."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            said = " ".join(str(error).split())[:300]
            raise OffloadError(
                f"{self._what} between host and device failed: {said}; "
                "the cache is as it was before this forward, which may be tried again"
            ) from error
