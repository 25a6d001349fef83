"""What crosses from the host: a fixed number of chunks of device memory, filled ahead of the layer that reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deltakv.errors import OffloadError
from deltakv.offload.lanes import Lane, Lanes
from deltakv.offload.memory import device_memory
from deltakv.offload.pieces import Piece


@dataclass(frozen=True)
class Load:
    """One piece on its way. source: its records in host memory, in order (`Records.parts`). after: the mark behind
    which the host has them. owner: whose piece it is, where several caches share the chunks."""

    layer: int
    piece: Piece
    source: Callable[[], list[Tensor]]
    after: Any
    owner: Any = None


class Fetch(Protocol):
    """Something else that crosses in its turn, to a place of its own: a layer's weights."""

    def ready(self) -> bool:
        """Whether the place will be free behind marks that are there already."""
        ...

    def queue(self, lane: Lane) -> None:
        """Queues the copies."""
        ...


@dataclass
class _Chunk:
    """Device memory for one piece. free: the mark behind which nobody reads it any more."""

    memory: Tensor
    free: Any = None


class Loads:
    """A queue of pieces through `count` chunks of `chunk_bytes` on the device.

    As many copies are queued as there are free chunks, so the bus always has the next piece, of this layer or the
    next one. The host waits for nothing. Raises `OffloadError` if the device has no such memory.
    """

    def __init__(self, lanes: Lanes, device: torch.device, count: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self._lanes = lanes
        memory = device_memory(count, chunk_bytes, device)
        for tensor in memory:
            lanes.load.keep(tensor)
        self._chunks = [_Chunk(tensor) for tensor in memory]
        self._jobs: Iterator[Load | Fetch] = iter(())
        self._next: Load | Fetch | None = None
        self._free: deque[_Chunk] = deque()
        self._filled: deque[tuple[Load, _Chunk, Tensor, Any]] = deque()
        self._taken: _Chunk | None = None
        self._through: Any = None

    def start(self, jobs: Iterable[Load | Fetch]) -> None:
        """Queues a step's pieces; what is left of an earlier step, which then has failed, is forgotten."""
        self._jobs = iter(jobs)
        self._next = next(self._jobs, None)
        self._filled.clear()
        self._free = deque(self._chunks)
        self._taken, self._through = None, self._lanes.compute.mark()
        for chunk in self._chunks:
            chunk.free = self._through
        self._fill()

    def proceed(self) -> None:
        """Something that a `Fetch` waits for has come."""
        self._fill()

    def take(self, layer: int, piece: Piece, owner: Any = None) -> Tensor:
        """The records of the next piece, uint8 [tokens, rows, record] on the device, to be read on the model's lane
        until `release`. Raises `OffloadError` if the next piece is another one."""
        assert self._taken is None, "a piece is released before the next one is taken"
        first = self._filled[0][0] if self._filled else None
        if first is None or (first.layer, first.piece) != (layer, piece) or first.owner is not owner:
            raise OffloadError(
                f"layer {layer} asked for its cache out of turn; layers must run once each, in order, as they are "
                "in the model"
            )
        # Those behind are under way: there was a barrier before this piece, so every chunk was free.
        self._lanes.compute.wait(self._filled[piece.ahead][3])
        _, self._taken, records, _ = self._filled.popleft()
        return records

    def release(self) -> None:
        """All work on the piece last taken has been queued on the model's lane."""
        assert self._taken is not None
        self._through = self._taken.free = self._lanes.compute.mark()
        self._free.append(self._taken)
        self._taken = None
        self._fill()

    def _fill(self) -> None:
        """Queues copies into all free chunks; a piece behind a barrier only when all before it have been dealt with."""
        while self._next is not None:
            job, lane = self._next, self._lanes.load
            if not isinstance(job, Load):
                if not job.ready():
                    return
                job.queue(lane)
                self._next = next(self._jobs, None)
                continue
            if not self._free:
                return
            if job.piece.barrier and (self._filled or self._taken is not None):
                return
            chunk = self._free.popleft()
            lane.wait(chunk.free)
            lane.wait(job.after)
            if job.piece.barrier:
                lane.wait(self._through)
            source = job.source()
            rows, record = source[0].shape[1:]
            records = chunk.memory[: job.piece.tokens * rows * record].view(-1, rows, record)
            done = 0
            for part in source:
                lane.copy(records[done : done + len(part)], part)
                done += len(part)
            self._filled.append((job, chunk, records, lane.mark()))
            self._next = next(self._jobs, None)
