"""The rows of a batch in host memory: the counterpart of `cache.PagedKV`, for a cache that does not fit the device.

A step appends tokens with `begin`; its layers `store` their new K, V and X and `attend` to what there was, chunk by
chunk; `commit` makes it count. A step that fails half way is never committed, and the next `begin` forgets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deltakv.cache import Append, Row
from deltakv.errors import ConfigError, UnsupportedUseError
from deltakv.offload.attention import Attention
from deltakv.offload.codecs import InputCodec, codec
from deltakv.offload.config import Host
from deltakv.offload.lanes import Lanes, lanes_of
from deltakv.offload.layer import NO_LIMIT, HostLayer, Recompute, rearrange
from deltakv.offload.loads import Load, Loads
from deltakv.offload.memory import HostMemory, Records
from deltakv.offload.pieces import Piece, pieces
from deltakv.offload.planner import Splitter
from deltakv.offload.stores import Places, Stores


class HostRows:
    """All rows of a batch, for the layers numbered in `layers`, which run in that order.

    page_size: as in `cache.PagedKV`; nothing here is in pages, and a slot is a token's number in its row.
    splitter: how much to recompute. inputs: by layer, what the caller has of X until it calls `store`.
    make_lanes: the lanes of a device, for tests that delay copies.
    """

    def __init__(
        self,
        layers: Sequence[int],
        page_size: int,
        host: Host,
        splitter: Splitter,
        make_lanes: Callable[[torch.device, bool], Lanes] = lanes_of,
    ) -> None:
        self.page_size, self.host, self.splitter = page_size, host, splitter
        self.rows: list[Row] = []
        self.inputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._order = tuple(layers)
        self._make_lanes = make_lanes
        self._memory: HostMemory | None = None
        self._layers: dict[int, HostLayer] = {}
        self._pieces: dict[int, tuple[Piece, ...]] = {}
        self._append = Append([], [], [])
        self._past: Tensor | None = None
        self._ahead = 0
        self._lanes: Lanes | None = None
        self._device = torch.device("cpu")
        self._loads: Loads | None = None
        self._shared = False
        self._stores: Stores | None = None

    def reserve(self, tokens: int) -> None:
        """Says how long rows are expected to get: X need not be kept beyond what will be recomputed then."""
        self._ahead = max(self._ahead, tokens)
        longest = max((row.length for row in self.rows), default=0)
        for index, layer in self._layers.items():
            if layer.x is not None and longest <= layer.x_limit:  # X is still kept of every token
                layer.x_limit = max(layer.x_limit, self.splitter.most(index, len(self.rows), self._ahead))

    def change(self, host: Host, splitter: Splitter) -> None:
        """From the next step on another schedule, another share (as far as X is kept), other chunks. Raises
        `ConfigError` if what lies in host memory would have to change."""
        if (host.bits, host.pinned) != (self.host.bits, self.host.pinned):
            raise ConfigError("bits and pinned belong to what is stored already; use a new cache")
        self._settle()
        self.host, self.splitter = host, splitter
        self._loads = self._stores = None
        self._shared = False
        if self._lanes is not None:
            self._lanes = self._make_lanes(self._device, host.overlap)

    def join(self, loads: Loads) -> None:
        """From the next step on its pieces cross through `loads`, whose owner starts them with what `jobs` gives for
        each layer, in the order in which layers of several caches run; up to the next `change`."""
        self._settle()
        self._loads, self._shared = loads, True

    def keeps_inputs(self, layer: int) -> bool:
        """Whether `store` wants X of the step under way."""
        known = self._layers.get(layer)
        return known.x is not None if known is not None else self._x_limit(layer) > 0

    def begin(self, counts: list[int]) -> Append:
        """Makes room for `counts[r]` more tokens in row r, and lets their past begin to cross. The first call decides
        the batch size. Raises `OffloadError` if the host has no room."""
        if not self.rows:
            self.rows = [Row() for _ in counts]
        past = [row.length for row in self.rows]
        lengths = [row.length + count for row, count in zip(self.rows, counts, strict=True)]
        self._ensure(max(lengths))
        slots = [list(range(old, new)) for old, new in zip(past, lengths, strict=True)]
        self._append, self._past = Append(past, lengths, slots), None
        self.inputs.clear()  # what a forward that failed has left
        self._start_loads(max(past))
        return self._append

    def store(self, layer: int, k: Tensor, v: Tensor, inputs: tuple[Tensor, Tensor] | None, real: Tensor) -> None:
        """A layer's new tokens.

        k, v: [rows, kv_heads, width, head_dim], K with RoPE. inputs: X [rows, width, hidden] and positions, int64
        [rows or 1, width], where `keeps_inputs`. real: bool [rows, width] on the CPU, which columns are tokens; those
        of a row stand together.
        """
        if layer not in self._layers:
            self._make_layer(layer, k, None if inputs is None else inputs[0])
        known, counts = self._layers[layer], real.sum(1).tolist()
        places = Places(self._append.past, counts, real.byte().argmax(1).tolist())
        known.write(self._stores_for(known), places, k.detach(), v.detach(), inputs)
        assert self._lanes is not None
        known.stored = self._lanes.store.mark()

    def attend(
        self,
        layer: int,
        query: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        scale: float,
        sinks: Tensor | None,
        recompute: Recompute | None,
    ) -> Tensor:
        """Causal attention of the new tokens over their rows, themselves included.

        query: [rows, n_heads, width, head_dim]; k, v, real: as in `store`; sinks: [n_heads] or None; recompute: for
        layers that keep X. Returns [rows, width, n_heads, head_dim] in query's dtype. Raises `OffloadError`.
        """
        attention = Attention(query, self._append.past, scale, self._lengths(query.device))
        attention.among_themselves(k, v, real)
        known = self._layers[layer]
        for piece in self._pieces.get(layer, ()):
            assert self._loads is not None
            records = self._loads.take(layer, piece, self)
            attention.over(*known.keys_and_values(piece.kind, records, recompute), piece.start)
            self._loads.release()
        return attention.result(sinks)

    def commit(self, lengths: list[int]) -> None:
        """The tokens up to `lengths[r]` now belong to row r."""
        for row, length in zip(self.rows, lengths, strict=True):
            row.length = length

    def truncate(self, lengths: list[int]) -> None:
        """Drops the tokens of each row from `lengths[r]` on."""
        for row, length in zip(self.rows, lengths, strict=True):
            row.length = min(row.length, length)

    def rearrange(self, indices: list[int]) -> None:
        """New row i is old row `indices[i]`. Copies the whole cache in host memory, unless nothing changes place.
        Raises `OffloadError`, with all rows as they were."""
        if indices != list(range(len(self.rows))):
            self._settle()
            rearrange(self._layers.values(), indices, max((self.rows[index].length for index in indices), default=0))
        self.rows = [Row([], self.rows[index].length) for index in indices]

    def unshare(self) -> None:
        """Rows never share memory here."""

    def clear(self) -> None:
        """Forgets all rows, and gives their memory back."""
        self._settle()
        for layer in self._layers.values():
            for records in layer.records():
                records.release()
        self._layers, self._pieces, self.rows = {}, {}, []
        self._append = Append([], [], [])

    def block_table(self, tokens: int | None = None) -> Tensor:
        """int32 [rows, 1, 0]: there are no pages."""
        return torch.zeros((len(self.rows), 1, 0), dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that rows hold, over all layers, X included."""
        return sum(layer.nbytes(row.length) for layer in self._layers.values() for row in self.rows)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken, room ahead included."""
        return 0 if self._memory is None else self._memory.taken

    @property
    def device_bytes(self) -> int:
        """Bytes of chunks on the device, whatever the rows' length."""
        loads = 0 if self._loads is None else self.host.chunks * self._loads.chunk_bytes
        return loads + (0 if self._stores is None else self._stores.nbytes)

    def _lengths(self, device: torch.device) -> Tensor | None:
        """The rows' lengths before this step, if they differ: once a step, because the host waits for it."""
        past = self._append.past
        if self._past is None and len(set(past)) > 1:
            self._past = torch.tensor(past, device=device)
        return self._past

    def _x_limit(self, layer: int) -> int:
        """How many first tokens of a row may be recomputed, as far as its length is known."""
        if not self._ahead:
            return NO_LIMIT if self.splitter.most(layer, max(len(self.rows), 1), 1 << 20) else 0
        return self.splitter.most(layer, max(len(self.rows), 1), self._ahead)

    def _make_layer(self, index: int, k: Tensor, x: Tensor | None) -> None:
        """Finds out from its first K what a layer stores, and takes memory for the step under way."""
        if self._lanes is None:
            self._device, self._lanes = k.device, self._make_lanes(k.device, self.host.overlap)
            pinned = self.host.pinned and k.device.type == "cuda"
            self._memory = HostMemory(pinned=pinned, limit=self.host.limit_bytes)
        if k.device != self._device:
            raise UnsupportedUseError(
                f"layers on {self._device} and on {k.device} cannot share a cache in host memory; put the model on "
                "one device, or use kv_device='device'"
            )
        assert self._memory is not None
        kept = codec(k.shape[1], k.shape[3], k.dtype, self.host.bits)
        inputs = InputCodec(x.shape[-1], x.dtype) if x is not None else None
        rows, limit = len(self.rows), self._x_limit(index) if inputs is not None else 0
        layer = HostLayer(
            kept, Records(self._memory, rows, kept.record), inputs,
            None if inputs is None else Records(self._memory, rows, inputs.record), limit,
        )  # fmt: skip
        longest = max(self._append.lengths)
        if not self._layers:  # before any layer takes memory, all must be known to find some
            need = sum(records.missing(tokens) for records, tokens in layer.room(longest))
            self._memory.check(need * len(self._order), _what(longest, rows, len(self._order)))
        for records, tokens in layer.room(longest):
            records.ensure(tokens)
        self._layers[index] = layer

    def _ensure(self, longest: int) -> None:
        """Room in all known layers for rows of that length. What is seen to be too much is refused before any is taken;
        if a slab is refused on the way, layers keep what they have got, for next time."""
        wanted = [room for layer in self._layers.values() for room in layer.room(longest)]
        need = sum(records.missing(tokens) for records, tokens in wanted)
        if need:
            assert self._memory is not None
            self._memory.check(need, _what(longest, len(self.rows), len(self._layers)))
            for records, tokens in wanted:
                records.ensure(tokens)

    def _start_loads(self, longest: int) -> None:
        """Lays out what crosses in this step, layer by layer."""
        self._pieces = {}
        if not longest or not self._layers:
            return
        batch = len(self.rows)
        need = max(records.token_bytes for layer in self._layers.values() for records in layer.records())
        if self._loads is None or self._loads.chunk_bytes < need:
            assert self._lanes is not None and not self._shared, "shared chunks hold a token of every cache"
            self._loads = Loads(self._lanes, self._device, self.host.chunks, max(self.host.chunk_bytes, need))
        room = self._loads.chunk_bytes
        for index in self._order:
            layer = self._layers[index]
            split = x_tokens = 0
            if layer.x is not None:
                split = min(self.splitter.tokens(index, batch, longest), layer.x_limit, longest)
                x_tokens = room // layer.x.token_bytes
            self._pieces[index] = pieces(
                longest,
                split,
                max(x_tokens, 1),
                room // layer.kv.token_bytes,
                self.splitter.schedule,
                self.host.together,
            )
        if not self._shared:
            self._loads.start(load for index in self._order for load in self.jobs(index))

    def jobs(self, layer: int) -> Iterator[Load]:
        """What crosses for a layer in the step under way."""
        known = self._layers[layer]
        for piece in self._pieces[layer]:
            yield Load(layer, piece, known.source(piece), known.stored, self)

    def _stores_for(self, layer: HostLayer) -> Stores:
        need = max(records.token_bytes for records in layer.records())
        if self._stores is None or self._stores.chunk_bytes < need:
            assert self._lanes is not None
            self._stores = Stores(self._lanes, self._device, max(self.host.chunk_bytes, need))
        return self._stores

    def _settle(self) -> None:
        """Waits until the host has all that was stored, and nothing is on its way to the device."""
        if self._lanes is not None:
            self._lanes.store.settle()
            self._lanes.load.settle()


def _what(tokens: int, rows: int, layers: int) -> str:
    return f"a cache of {rows} x {tokens:,} tokens in {layers} layers"
