"""What goes back to the host: the records of new tokens, off the critical path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltakv.offload.lanes import Lanes
from deltakv.offload.memory import Records, device_memory

#: Chunks on the device: one is filled while the other is copied.
_CHUNKS = 2


@dataclass(frozen=True)
class Places:
    """Where a forward's columns go. past: tokens of each row before. counts: its new ones. first: the column of the
    first new one. The columns of a row's new tokens stand together."""

    past: list[int]
    counts: list[int]
    first: list[int]

    @property
    def level(self) -> bool:
        """Whether all rows are equally long: then what is new lies in one piece."""
        return len(set(self.past)) == 1

    def columns(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of level rows, the columns of the tokens [start, stop), and the rows: int64 [tokens, rows] each; where a row
        has no such token, some other column of it."""
        first = torch.tensor([f + start - self.past[0] for f in self.first])
        last = torch.tensor([f + max(c - 1, 0) for f, c in zip(self.first, self.counts, strict=True)])
        columns = torch.minimum(first + torch.arange(stop - start)[:, None], last)
        return columns.to(device), torch.arange(len(self.past), device=device).expand(columns.shape)


class Stores:
    """Copies records to host memory through two chunks of `chunk_bytes` on the device, however many they are."""

    def __init__(self, lanes: Lanes, device: torch.device, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self._lanes, self._device = lanes, device
        self._chunks = device_memory(_CHUNKS, chunk_bytes, device)
        for chunk in self._chunks:
            lanes.store.keep(chunk)
        self._free: list[Any] = [None] * _CHUNKS
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks."""
        return sum(chunk.numel() for chunk in self._chunks)

    def write(self, target: Records, places: Places, limit: int, encode: Callable[[tuple[Any, ...]], Tensor]) -> None:
        """Stores new tokens, those before token `limit` of their row.

        encode: for an index into [columns, rows] the records, uint8 [tokens, rows, record], on the device.
        """
        width = max((f + c for f, c in zip(places.first, places.counts, strict=True)), default=0)
        step = max(1, self.chunk_bytes // target.token_bytes)
        if places.level:
            start, stop = places.past[0], min(limit, places.past[0] + max(places.counts))
            plain = len(set(zip(places.first, places.counts, strict=True))) == 1
            for at in range(start, stop, step):
                end = min(at + step, stop)
                column = places.first[0] + at - start
                index = (slice(column, column + end - at),) if plain else places.columns(at, end, self._device)
                self._send(encode(index), target.parts(at, end))
        elif width == 1:
            self._send_cells(encode((slice(0, 1),)), target, places, limit)
        else:
            self._lanes.store.settle()
            for at in range(0, width, step):
                records = encode((slice(at, min(at + step, width)),)).cpu()
                _scatter(records, at, target, places, limit)

    def _stage(self, records: Tensor) -> tuple[int, Tensor]:
        """The records in one of the chunks, which the store lane then may read."""
        turn, self._turn = self._turn, (self._turn + 1) % _CHUNKS
        self._lanes.compute.wait(self._free[turn])
        staged = self._chunks[turn][: records.numel()].view(records.shape)
        staged.copy_(records)
        self._lanes.store.wait(self._lanes.compute.mark())
        return turn, staged

    def _send(self, records: Tensor, parts: list[Tensor]) -> None:
        turn, staged = self._stage(records)
        done = 0
        for part in parts:
            self._lanes.store.copy(part, staged[done : done + len(part)])
            done += len(part)
        self._free[turn] = self._lanes.store.mark()

    def _send_cells(self, records: Tensor, target: Records, places: Places, limit: int) -> None:
        """One token a row, of rows that are not equally long: a copy for each run of rows that are."""
        turn, staged = self._stage(records)
        row = 0
        while row < len(places.past):
            token, run = places.past[row], row + 1
            real = places.counts[row] > 0
            while run < len(places.past) and (places.past[run], places.counts[run] > 0) == (token, real):
                run += 1
            if real and token < limit:
                self._lanes.store.copy(target.parts(token, token + 1)[0][0, row:run], staged[0, row:run])
            row = run
        self._free[turn] = self._lanes.store.mark()


def _scatter(records: Tensor, at: int, target: Records, places: Places, limit: int) -> None:
    """Several tokens a row, of rows that are not equally long (a later turn): the host puts them in their places.

    records: on the host, of the columns from `at` on.
    """
    for row, (past, count, first) in enumerate(zip(places.past, places.counts, places.first, strict=True)):
        low, high = max(first, at), min(first + count, at + len(records), first + limit - past)
        done = low
        for part in target.parts(past + low - first, past + high - first) if low < high else ():
            part[:, row] = records[done - at : done - at + len(part), row]
            done += len(part)
