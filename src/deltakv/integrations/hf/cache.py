"""A transformers `Cache` over the paged pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from deltakv.cache import PagedKV, RowStore
from deltakv.cache.rows import Row
from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.decoding import Decoding
from deltakv.integrations.hf.layers import PagedLayer, State, WindowedLayer
from deltakv.integrations.hf.padding import Columns
from deltakv.integrations.hf.step import Chunk


class PagedCache(Cache):
    """The KV cache of a model under a method: rows in a paged pool, stored without padding.

    windows: for each layer its sliding window or None; layers with one keep transformers' own sliding cache.
    page_size: tokens a page. max_length: the length rows are expected to reach, in tokens, if known.
    static: its tensors keep their places and shapes while rows decode, up to `max_length`, so that `generate`
        compiles the forward and captures it; only for models whose layers have no window.
    rows: where the rows are, if not in a pool of pages.
    Lengths that transformers asks for (`get_seq_length`, `crop`) count columns, padding included, as it expects.
    """

    layer_type: ClassVar[type[PagedLayer]] = PagedLayer
    #: Whether a page that a method drops is lost, and not just left unread.
    evicts: ClassVar[bool] = False

    def __init__(
        self,
        windows: Sequence[int | None],
        page_size: int,
        max_length: int | None = None,
        *,
        static: bool = False,
        rows: RowStore | None = None,
    ) -> None:
        kv = PagedKV(len(windows), page_size)
        self.state = State(kv if rows is None else rows, kv.pool, Decoding(kv, static))
        layers = [
            self.layer_type(self.state, index) if window is None else WindowedLayer(sliding_window=window)
            for index, window in enumerate(windows)
        ]
        super().__init__(layers=layers)
        self.windows = tuple(windows)
        self._before: list[dict[str, Any]] = []
        if max_length is not None:
            self.state.kv.reserve(max_length)

    @property
    def kv(self) -> RowStore:
        """The rows: a `PagedKV` with its pool, unless they are somewhere else (`HostCache`)."""
        self.settle()
        return self.state.kv

    @property
    def page_size(self) -> int:
        return self.state.kv.page_size

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile its forwards and capture them."""
        return self.state.decoding.static

    @property
    def kv_bytes(self) -> int:
        """Bytes that hold tokens: the pool's pages in use, and the K and V of layers with a sliding window."""
        windowed = sum(
            tensor.nbytes
            for layer in self.layers
            if isinstance(layer, WindowedLayer)
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )
        return self.kv.nbytes + windowed

    @property
    def can_decode(self) -> bool:
        """Whether the next forward of one token a row, without a mask, may keep its books on the device."""
        return self.decoding or (self.state.seen > 0 and not any(self.windows))

    def is_unpadded(self, batch: int) -> bool:
        """Whether all columns of all `batch` rows are known to hold a token."""
        columns = self.state.columns
        if columns is None or len(columns.real) != batch:
            return False
        return self.state.decoding.unpadded if self.decoding else columns.are_real()

    @property
    def decoding(self) -> bool:
        """Whether the books of the rows are on the device now (until `settle`)."""
        return self.state.decoding.started

    @property
    def announced(self) -> bool:
        """Whether the next forward is one that keeps its books on the device."""
        return self.state.decoding.announced

    def announce(self, device: torch.device, finished: Tensor | None) -> None:
        """Makes room for one more token in every row. The next forward, of one token a row and without a mask, then
        needs nothing from the host, compiled or not. device: the model's. finished: see `Handle.announce`."""
        decoding = self.state.decoding
        if not decoding.started:
            assert self.can_decode and self.state.columns is not None
            self.abort()
            decoding.start(self.state.columns, device)
        decoding.announce(finished)

    def mask(self, finished: Tensor) -> Tensor:
        """int64 [batch, seen + 1], the mask of all columns and of one more, which is padding in `finished` rows: for a
        forward that the host has to lay out where others of its kind were announced."""
        self.settle()
        assert self.state.columns is not None
        shown = np.concatenate([self.state.columns.real, ~finished.cpu().numpy()[:, None]], axis=1)
        return torch.from_numpy(shown).to(finished.device).long()

    def settle(self) -> None:
        """Lets the host catch up with what rows have decoded; waits for the device."""
        decoding, columns = self.state.decoding, self.state.columns
        if decoding.started:
            assert columns is not None
            lengths, seen = decoding.stop()
            self.state.kv.commit(lengths)
            self.state.known.grown(lengths, self.page_size)
            self.state.columns = columns.grown(lengths, seen)

    def begin(self, batch: int, width: int, mask: Tensor | None) -> Chunk:
        """Lays out a forward of `width` columns, which counts from `commit` on. Raises `MaskError`.

        A step that was begun and never committed (its forward failed) is forgotten.
        """
        self.abort()
        self.settle()
        kv = self.state.kv
        columns = self.state.columns if self.state.columns is not None else Columns.none(batch)
        if len(columns.real) != batch:
            raise UnsupportedUseError(
                f"the cache holds {len(columns.real)} rows, but this forward has {batch}; use a cache of its own"
            )
        after, real = columns.extended(mask, width)
        if columns.seen:  # the mask may have dropped the end of some rows
            columns = after.cropped(width)
            self._truncate(columns.counts())
            self.state.columns = columns
        append = kv.begin(real.sum(1).tolist())
        self._before = [dict(layer.__dict__) for layer in self._windowed()]  # their updates replace tensors
        slots = torch.tensor([slot for row in append.slots for slot in row], dtype=torch.long)
        step = Chunk(
            decode=columns.seen > 0 and width == 1,
            pages=slots // self.page_size,
            offsets=slots % self.page_size,
            block_table=kv.block_table(max(append.lengths)),
            seq_lens=(torch.tensor(append.lengths, dtype=torch.int32) * real.any(1))[:, None],
            width=width,
            onto_past=columns.seen > 0,
            append=append,
            columns=after,
            real=real,
            stored=None if bool(real.all()) else real.flatten().nonzero().flatten(),
            past_lens=torch.tensor(append.past, dtype=torch.int32),
        )
        self.state.step = step
        return step

    def abort(self) -> None:
        """Forgets a step that did not come through. Windowed layers, which count as they go, go back to before it."""
        self.state.decoding.abort()
        step, self.state.step = self.state.step, None
        if isinstance(step, Chunk):
            for layer, before in zip(self._windowed(), self._before, strict=True):
                layer.__dict__.update(before)
            if self.state.columns is None:  # it was the first one: not even the batch size is decided
                self.state.kv.clear()

    def commit(self) -> None:
        """The forward came through: its tokens count from now on."""
        step, self.state.step = self.state.step, None
        if isinstance(step, Chunk):
            self.state.kv.commit(step.append.lengths)
            self.state.columns = step.columns
            self._before = []
            if step.noted:
                self.state.known.grown(step.append.lengths, self.page_size)
            elif not step.decode and not step.memories:
                self.state.known.truncated(step.append.past, self.page_size, final=self.evicts)
        else:
            self.state.decoding.commit()
        for layer, memory in ({} if step is None else step.memories).items():
            self.state.known.remember(layer, memory)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns so far, padding included; the same for every layer. In an announced forward a tensor, as in
        transformers' own static cache: a number would be compiled in."""
        return self.state.decoding.columns[0] if self.announced else self.state.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last columns: `-n` drops n; a positive number is the length to keep (transformers before 5.2x)."""
        if tokens_to_remove == 0 and not any(self.windows):
            return  # `generate` says so after each step, and nothing has to wait for that
        self.abort()
        self.settle()
        for layer in self._windowed():  # first, because a window that has forgotten refuses
            layer.crop(tokens_to_remove)
        seen = self.get_seq_length()
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(seen - tokens_to_remove, 0)
        if self.state.columns is not None and drop:
            columns = self.state.columns.cropped(drop)
            self._truncate(columns.counts())
            self.state.columns = columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`; pages are shared until written."""
        self._rearrange(beam_idx.tolist())
        for layer in self._windowed():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side; pages are shared until written."""
        self.settle()
        if self.state.columns is not None:
            self._rearrange([row for row in range(len(self.state.columns.real)) for _ in range(repeats)])
        for layer in self._windowed():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` (numbers, or a bool for each row)."""
        chosen = torch.as_tensor(indices)
        self._rearrange((chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen).tolist())
        for layer in self._windowed():
            layer.batch_select_indices(indices)

    def unshare(self) -> None:
        """Gives each row pages of its own, copying what rows shared (for benchmarks that must read real bytes)."""
        self.kv.unshare()

    def reset(self) -> None:
        """Forgets all rows; the pool's memory is kept."""
        self.kv.clear()
        self.state.known.clear()
        self.state.columns = self.state.step = None
        for layer in self._windowed():
            layer.reset()

    def _truncate(self, counts: list[int]) -> None:
        if any(count < row.length for count, row in zip(counts, self.state.kv.rows, strict=True)):
            self.state.known.truncated(counts, self.page_size, final=self.evicts)
        self.state.kv.truncate(counts)

    def rows_of(self, layer: int) -> list[Row]:
        """The rows as that layer holds them."""
        return self.state.kv.rows

    def _rearrange(self, indices: list[int]) -> None:
        self.settle()
        if self.state.columns is not None:
            self.kv.rearrange(indices)
            self.state.known.rearrange(indices)
            self.state.columns = self.state.columns.rearranged(indices)

    def _windowed(self) -> list[WindowedLayer]:
        return [layer for layer in self.layers if isinstance(layer, WindowedLayer)]
