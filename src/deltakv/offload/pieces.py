"""In which pieces, and in which order, a layer's X, K and V cross the bus."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from deltakv.offload.scheduler import Schedule


class Kind(enum.Enum):
    """What a piece holds."""

    X = "X"  #: layer inputs, to recompute K and V from
    KV = "KV"  #: K and V as they were


@dataclass(frozen=True)
class Piece:
    """The tokens [start, stop) of all rows, no more than a chunk on the device holds.

    barrier: this piece may cross only when all that crossed before has been dealt with (the first X of a round of the
    serial schedule). ahead: it is dealt with only when so many more, right behind it, have crossed too (the round's X).
    """

    kind: Kind
    start: int
    stop: int
    barrier: bool = False
    ahead: int = 0

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@functools.lru_cache(maxsize=256)
def pieces(
    length: int, split: int, x_tokens: int, kv_tokens: int, schedule: Schedule, together: int = 1
) -> tuple[Piece, ...]:
    """All of a layer's `length` tokens, the first `split` of them as X, in the order in which they cross.

    x_tokens, kv_tokens: the most that a chunk holds. Each X comes before the K and V that cross while it is
    recomputed, and these are spread evenly: chunks are few, and both the bus and the GPU should always have one. The
    serial schedule runs in rounds of at most `together` X, less than there are chunks, and their share of K and V,
    which takes as long as the paper's single round with room for all X: the time is linear in the tokens.
    """
    assert 0 <= split <= length and min(x_tokens, kv_tokens, together) > 0
    if schedule is Schedule.SERIAL and split:
        return tuple(_rounds(length, split, x_tokens, kv_tokens, together))
    x = _cut(Kind.X, 0, split, -(-split // x_tokens))
    kv = _cut(Kind.KV, split, length, -(-(length - split) // kv_tokens))
    placed = [(index / len(x), 0, piece) for index, piece in enumerate(x)]
    placed += [((index + 0.5) / len(kv), 1, piece) for index, piece in enumerate(kv)]
    return tuple(piece for _, _, piece in sorted(placed, key=lambda entry: entry[:2]))


def _rounds(length: int, split: int, x_tokens: int, kv_tokens: int, together: int) -> Iterator[Piece]:
    """X of a round, all of it, and then its share of K and V."""
    count = -(-split // (x_tokens * together))
    for part, share in zip(_edges(0, split, count), _edges(split, length, count), strict=True):
        x = _cut(Kind.X, *part, -(-(part[1] - part[0]) // x_tokens))
        yield dataclasses.replace(x[0], barrier=True, ahead=len(x) - 1)
        yield from x[1:]
        yield from _cut(Kind.KV, *share, -(-(share[1] - share[0]) // kv_tokens))


def _cut(kind: Kind, start: int, stop: int, count: int) -> list[Piece]:
    """`count` pieces, or less, of sizes that differ by one token at most."""
    return [Piece(kind, low, high) for low, high in _edges(start, stop, count) if low < high]


def _edges(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) in `count` parts."""
    edges = [start + (stop - start) * index // count for index in range(count + 1)] if count else []
    return list(itertools.pairwise(edges))
