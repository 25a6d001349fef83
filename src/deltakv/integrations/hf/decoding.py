"""Decode steps that keep their own books on the device.

While rows grow by one token a step, everything a step needs follows from a few tensors: how long the rows are, where
their pages lie, which rows have finished. They live as long as the batch, each forward moves them on, and the host
neither waits for the device nor changes a shape; so a forward can be one CUDA graph, and it is the same forward
without one. The host catches up when it needs to know (`PagedCache.settle`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltakv.cache import PagedKV
from deltakv.integrations.hf.padding import Columns
from deltakv.integrations.hf.step import Step

if TYPE_CHECKING:
    from deltakv.integrations.hf.stats import Meter


class Decoding:
    """The books of one batch while it decodes.

    kv: the rows; their lengths there are those at the start, or more.
    lengths: int32 [rows, 1], tokens of each row. columns: int64 [1], columns so far, padding included.
    block_table: int32 [rows, 1, width], with room for all that the rows may grow to.
    finished: bool [rows], what comes now for the row is padding; nothing is stored, and no attention spent on it.
    owner: the name of the handle that announced the forward. meter: counts it.
    announced: the host has made room for one more token a row; the next forward takes it.
    unpadded: all columns of all rows are known to hold a token.
    """

    lengths: Tensor
    columns: Tensor
    block_table: Tensor
    finished: Tensor
    owner: str
    meter: Meter

    def __init__(self, kv: PagedKV, static: bool) -> None:
        self.kv = kv
        self.static = static
        self.announced = self.started = self.unpadded = self._all_go_on = False
        self._first_column = self._steps = self._room = self._bytes_a_page = self._bytes_apart = 0

    def start(self, columns: Columns, device: torch.device) -> None:
        """Takes over rows that the host has laid out. columns: theirs."""
        assert not self.started
        self.kv.begin([1] * len(self.kv.rows))  # a page that rows share becomes each one's own before it is written
        lengths = torch.tensor([[row.length] for row in self.kv.rows], dtype=torch.int32)
        self._place(device, lengths=lengths, columns=torch.tensor([columns.seen]), block_table=self.kv.block_table())
        self._place(device, finished=torch.zeros(len(lengths), dtype=torch.bool))
        if self.static:
            mark_static(*filter(lambda tensor: tensor is not None, [*self.kv.pool.k, *self.kv.pool.v]))
        self._first_column, self._steps, self._room = columns.seen, 0, self.kv.room
        self.started, self.announced = True, False
        self.unpadded, self._all_go_on = columns.are_real(), True
        self._bytes_a_page = self.kv.pool.bytes_a_page()
        pages = sum(-(-row.length // self.kv.page_size) for row in self.kv.rows)
        self._bytes_apart = self.kv.nbytes - pages * self._bytes_a_page  # less than none, for pages that rows share

    @property
    def seen(self) -> int:
        """Columns so far, padding included, as the host counts them."""
        return self._first_column + self._steps - self.announced

    @property
    def capacity(self) -> int:
        """Tokens that the table has room for."""
        return self.block_table.shape[2] * self.kv.page_size

    def announce(self, finished: Tensor | None) -> None:
        """Makes room for one more token a row. Twice without a forward in between is once.

        finished: as `Decoding.finished` for this forward, or None for no row.
        """
        if finished is not None:
            self.finished.copy_(finished)
            self.unpadded = self._all_go_on = False
        elif not self._all_go_on:
            self.finished.zero_()
            self._all_go_on = True
        if self.announced:
            return
        if self._steps == self._room:
            self._grow()
        self._steps += 1
        self.announced = True

    def step(self) -> Step:
        """The announced forward. No value is looked at, so it can be traced."""
        past, page_size = self.lengths[:, 0], self.kv.page_size
        page = self.block_table[:, 0].gather(1, (past // page_size)[:, None].long())[:, 0]
        return Step(
            decode=True,
            pages=page.long(),
            offsets=(past % page_size).long(),
            block_table=self.block_table,
            seq_lens=torch.where(self.finished, 0, past + 1)[:, None],
        )

    def commit(self) -> None:
        """The forward came through. Can be traced."""
        self.lengths.add_(~self.finished[:, None])
        self.columns.add_(1)
        self.announced = False

    def abort(self) -> None:
        """The announced forward failed: its token was never there."""
        self._steps -= self.announced
        self.announced = False

    def stop(self) -> tuple[list[int], int]:
        """Gives the rows back to the host: the tokens of each, and the columns so far. Waits for the device."""
        assert self.started
        self.started = self.announced = False
        return self.lengths[:, 0].tolist(), int(self.columns)

    def kv_reader(self) -> Callable[[], int]:
        """Tells the bytes that hold tokens, then and later, without keeping the pool alive."""
        lengths, size, each, apart = self.lengths, self.kv.page_size, self._bytes_a_page, self._bytes_apart
        return lambda: apart + int((lengths.add(size - 1) // size).sum()) * each

    def _grow(self) -> None:
        lengths = [row.length + self._steps for row in self.kv.rows]  # or less, where a row has finished
        self.kv.commit(lengths)
        self.kv.begin([1] * len(lengths))
        self._place(self.block_table.device, block_table=self.kv.block_table())
        self._first_column += self._steps
        self._steps, self._room = 0, self.kv.room

    def _place(self, device: torch.device, **values: Tensor) -> None:
        """Sets tensors, in place where their shape has not changed: a graph that was captured goes on reading them."""
        for name, value in values.items():
            known = getattr(self, name, None)
            if known is not None and known.shape == value.shape and known.device == device:
                known.copy_(value)
            else:
                with torch.inference_mode(False):  # made in inference mode, it could not be written outside of it
                    known = torch.empty_like(value, device=device).copy_(value)
                if self.static:
                    mark_static(known)
                setattr(self, name, known)


def mark_static(*tensors: Any) -> None:
    """Tells the compiler that these tensors stay where they are; others in their place later are captured anew."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)
        torch._dynamo.mark_static(tensor)
