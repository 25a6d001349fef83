"""One layer of a cache in host memory: what is stored of its tokens, and how K and V are had from that again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltakv.offload.codecs import Codec, InputCodec
from deltakv.offload.memory import Records, take_room
from deltakv.offload.pieces import Kind, Piece
from deltakv.offload.stores import Places, Stores

#: From X, [tokens, rows, hidden] (any strides, tokens and rows can be one dimension), and positions, int64 [tokens,
#: rows], to K as it is stored (with its norm and RoPE) and V: [tokens, rows, kv_heads, head_dim].
Recompute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: No row is that long.
NO_LIMIT = 1 << 60


@dataclass
class HostLayer:
    """codec, kv: K and V. inputs, x: X, of the first `x_limit` tokens of a row, or None where nothing is recomputed.
    stored: the mark behind which the host has all that was written."""

    codec: Codec
    kv: Records
    inputs: InputCodec | None = None
    x: Records | None = None
    x_limit: int = 0
    stored: Any = None

    def write(self, stores: Stores, places: Places, k: Tensor, v: Tensor, inputs: tuple[Tensor, Tensor] | None) -> None:
        """New tokens: see `HostRows.store`."""
        k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
        stores.write(self.kv, places, NO_LIMIT, lambda index: self.codec.encode(k[index], v[index]))
        if self.x is not None:
            assert self.inputs is not None and inputs is not None, "keeps_inputs() has asked for X"
            codec, x = self.inputs, inputs[0].detach().transpose(0, 1)
            positions = inputs[1].expand(x.shape[1], -1).T
            stores.write(self.x, places, self.x_limit, lambda index: codec.encode(x[index], positions[index]))

    def source(self, piece: Piece) -> Callable[[], list[Tensor]]:
        """Gives a piece's records in host memory."""
        records = self.kv if piece.kind is Kind.KV else self.x
        assert records is not None
        return lambda: records.parts(piece.start, piece.stop)

    def keys_and_values(self, kind: Kind, records: Tensor, recompute: Recompute | None) -> tuple[Tensor, Tensor]:
        """K and V of a piece that has arrived: [tokens, rows, kv_heads, head_dim]."""
        if kind is Kind.KV:
            return self.codec.decode(records)
        assert self.inputs is not None and recompute is not None, "X is kept where it can be used"
        return recompute(*self.inputs.decode(records))

    def records(self) -> list[Records]:
        return [self.kv] if self.x is None else [self.kv, self.x]

    def room(self, longest: int) -> list[tuple[Records, int]]:
        """How many tokens each of the records must hold for rows of that length."""
        room = [(self.kv, longest)]
        return room if self.x is None else [*room, (self.x, min(longest, self.x_limit))]

    def nbytes(self, length: int) -> int:
        """Bytes that are stored of a row of `length` tokens."""
        return sum(tokens * records.record for records, tokens in self.room(length))


def rearrange(layers: Iterable[HostLayer], indices: list[int], tokens: int) -> None:
    """In all layers row i becomes row `indices[i]`, of rows of at most `tokens` tokens. Of as many rows as before in
    place; else in new memory, and all of it is there before anything changes. Raises `OffloadError`, with all as it
    was."""
    known = [room for layer in layers for room in layer.room(tokens)]
    if all(records.rows == len(indices) for records, _ in known):
        for records, upto in known:
            records.reorder(indices, upto)
        return
    made = [(records.empty_like(len(indices)), upto) for records, upto in known]
    take_room(made)
    for (new, upto), (records, _) in zip(made, known, strict=True):
        records.become(new, indices, upto)
