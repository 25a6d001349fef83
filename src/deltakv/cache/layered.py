"""Rows whose layers give up pages each on its own: a pool of its own for every layer.

In `PagedKV` a page holds a token range of all layers, so it is free when the last of them has done with it; here a page
is one layer's, and leaves the pool with it. Rows count as if nothing were gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from deltakv.cache.pool import KVPool
from deltakv.cache.rows import GONE, Append, PagedKV, Row


class LayeredPool(KVPool):
    """The memory of all layers, as one pool; only K and V of a layer are to be had from it."""

    def __init__(self, by_layer: dict[int, PagedKV], page_size: int) -> None:
        super().__init__(0, page_size)
        self._by_layer = by_layer

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._by_layer[index].pool.layer(0)

    def ensure_layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._by_layer[index].pool.ensure_layer(0, like)


class LayeredRows:
    """A `RowStore` over one `PagedKV` a layer.

    layers: those that store here. by_layer: their rows. appends: where the last step's tokens go, by layer.
    """

    def __init__(self, layers: Sequence[int], page_size: int) -> None:
        self.page_size = page_size
        self.by_layer = {layer: PagedKV(1, page_size) for layer in layers}
        self.pool = LayeredPool(self.by_layer, page_size)
        self.appends: dict[int, Append] = {}

    @property
    def rows(self) -> list[Row]:
        """The rows of any layer: they differ in their pages alone."""
        return self._any.rows

    def reserve(self, tokens: int) -> None:
        """Nothing: room for tokens that will have gone by then is what this is there to save."""

    def begin(self, counts: list[int]) -> Append:
        """See `PagedKV.begin`; the slots are one layer's, and all are in `appends`."""
        self.appends = {layer: kv.begin(counts) for layer, kv in self.by_layer.items()}
        return next(iter(self.appends.values()))

    def commit(self, lengths: list[int]) -> None:
        for kv in self.by_layer.values():
            kv.commit(lengths)

    def truncate(self, lengths: list[int]) -> None:
        for kv in self.by_layer.values():
            kv.truncate(lengths)

    def rearrange(self, indices: list[int]) -> None:
        for kv in self.by_layer.values():
            kv.rearrange(indices)

    def unshare(self) -> None:
        for kv in self.by_layer.values():
            kv.unshare()

    def clear(self) -> None:
        for kv in self.by_layer.values():
            kv.clear()

    def block_table(self, tokens: int | None = None) -> Tensor:
        return self._any.block_table(tokens)

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes for kv in self.by_layer.values())

    @property
    def reserved_bytes(self) -> int:
        """What all pools take, used or not."""
        return sum(kv.pool.n_pages * kv.pool.bytes_a_page() for kv in self.by_layer.values())

    def drop(self, layer: int, dropped: Tensor) -> None:
        """Gives up the pages that bool [rows, width] says and that are still there; pools that have come to stand
        mostly empty shrink."""
        kv = self.by_layer[layer]
        held = kv.held()[:, : dropped.shape[1]] != GONE
        leaving = defaultdict(list)
        for index, number in (dropped[:, : held.shape[1]] & held).nonzero().tolist():
            leaving[index].append(number)
        for index, numbers in leaving.items():
            kv.give_up(index, numbers)
        if leaving:
            kv.shrink()

    def has_gone(self, layer: int) -> bool:
        """Whether a row of that layer has given up a page."""
        return any(GONE in row.pages for row in self.by_layer[layer].rows)

    def compact(self, layer: int) -> tuple[Tensor, list[int]]:
        """The past of a layer's rows as if pages that are gone had never been: a table, int32 [rows, 1, width], with
        room for the step that has begun; and the tokens of each row."""
        kv = self.by_layer[layer]
        kept = [[page for page in row.pages if page != GONE] for row in kv.rows]
        table = torch.zeros((len(kept), 1, max(map(len, kept))), dtype=torch.int32)
        for index, pages in enumerate(kept):
            table[index, 0, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table, [row.length - row.pages.count(GONE) * self.page_size for row in kv.rows]

    @property
    def _any(self) -> PagedKV:
        return next(iter(self.by_layer.values()))
