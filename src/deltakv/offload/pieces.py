"""In which pieces, and in which order, a layer's X, K and V cross the bus."""

from __future__ import annotations

import enum
import functools
import itertools
from dataclasses import dataclass

from deltakv.offload.scheduler import Schedule


class Kind(enum.Enum):
    """What a piece holds."""

    X = "X"  #: layer inputs, to recompute K and V from
    KV = "KV"  #: K and V as they were


@dataclass(frozen=True)
class Piece:
    """The tokens [start, stop) of all rows, no more than a chunk on the device holds.

    barrier: this piece may cross only when all that crossed before has been dealt with (the serial schedule's X).
    """

    kind: Kind
    start: int
    stop: int
    barrier: bool = False

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@functools.lru_cache(maxsize=256)
def pieces(length: int, split: int, x_tokens: int, kv_tokens: int, schedule: Schedule) -> tuple[Piece, ...]:
    """All of a layer's `length` tokens, the first `split` of them as X, in the order in which they cross.

    x_tokens, kv_tokens: the most that a chunk holds. Each X comes before the K and V that cross while it is
    recomputed, and these are spread evenly: chunks are few, and both the bus and the GPU should always have one. The
    serial schedule runs in rounds of one X and its share of K and V, which takes as long as the paper's single round
    with room for all X: the time is linear in the tokens.
    """
    assert 0 <= split <= length and min(x_tokens, kv_tokens) > 0
    serial = schedule is Schedule.SERIAL
    x = _cut(Kind.X, 0, split, -(-split // x_tokens), barrier=serial)
    rounds = len(x) if serial and x else 1
    kv = [
        piece
        for part in _cut(Kind.KV, split, length, rounds)
        for piece in _cut(Kind.KV, part.start, part.stop, -(-part.tokens // kv_tokens))
    ]
    placed = [(index / len(x), 0, piece) for index, piece in enumerate(x)]
    placed += [((index + 0.5) / len(kv), 1, piece) for index, piece in enumerate(kv)]
    return tuple(piece for _, _, piece in sorted(placed, key=lambda entry: entry[:2]))


def _cut(kind: Kind, start: int, stop: int, count: int, *, barrier: bool = False) -> list[Piece]:
    """`count` pieces, or less, of sizes that differ by one token at most."""
    edges = [start + (stop - start) * index // count for index in range(count + 1)] if count else []
    return [Piece(kind, low, high, barrier) for low, high in itertools.pairwise(edges) if low < high]
