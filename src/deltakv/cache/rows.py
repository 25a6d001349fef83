"""The paged KV cache: rows of tokens in a pool, addressed through block tables.

Rows are stored without padding: a row's first token is its first real one. A step appends tokens to the rows with
`begin`, which hands out slots and tables; `commit` makes it count. A step that fails half way is simply never
committed, and the next `begin` starts from where the last one that succeeded ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltakv.cache.allocator import PageAllocator
from deltakv.cache.pool import KVPool

#: The pool grows by at least this share of itself (a quarter), so that copying stays a constant share of writing.
GROWTH_SHARE = 4


@dataclass
class Row:
    """One sequence: its pages in order (some may lie ahead, still empty) and its tokens."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Append:
    """Where a step's new tokens go, and what the rows look like with them.

    past, lengths: tokens of each row before and with the new ones.
    slots: one list a row, page * page_size + offset of each new token.
    """

    past: list[int]
    lengths: list[int]
    slots: list[list[int]]


class PagedKV:
    """All rows of a batch in one pool.

    n_layers: layers that store here. page_size: tokens a page.
    """

    def __init__(self, n_layers: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = KVPool(n_layers, page_size)
        self.rows: list[Row] = []
        self._allocator = PageAllocator()
        self._ahead = 0
        self._table: Tensor | None = None

    def reserve(self, tokens: int) -> None:
        """Says how long rows are expected to get, so that each gets its pages side by side and at once."""
        self._ahead = max(self._ahead, self._pages(tokens))

    def begin(self, counts: list[int]) -> Append:
        """Makes room for `counts[r]` more tokens in row r. The first call decides the batch size."""
        if not self.rows:
            self.rows = [Row() for _ in counts]
        assert len(counts) == len(self.rows), "the batch size of a cache does not change between steps"
        past = [row.length for row in self.rows]
        lengths = [row.length + count for row, count in zip(self.rows, counts, strict=True)]
        self._make_room(lengths)
        slots = []
        for row, old, new in zip(self.rows, past, lengths, strict=True):
            if new > old:
                self._own_page(row, old // self.page_size)
            slots.append(
                [row.pages[t // self.page_size] * self.page_size + t % self.page_size for t in range(old, new)]
            )
        return Append(past, lengths, slots)

    def commit(self, step: Append) -> None:
        """The step's tokens now belong to the rows."""
        for row, length in zip(self.rows, step.lengths, strict=True):
            row.length = length

    def truncate(self, lengths: list[int]) -> None:
        """Drops the tokens of each row from `lengths[r]` on. Its pages stay with it."""
        for row, length in zip(self.rows, lengths, strict=True):
            row.length = min(row.length, length)

    def rearrange(self, indices: list[int]) -> None:
        """New row i is old row `indices[i]`. Rows made from the same one share its pages until they write."""
        old = self.rows
        kept: set[int] = set()
        rows = []
        for index in indices:
            pages = old[index].pages
            if index in kept:
                pages = pages[: self._pages(old[index].length)]
                self._allocator.share(pages)
            kept.add(index)
            rows.append(Row(list(pages), old[index].length))
        for index, row in enumerate(old):
            if index not in kept:
                self._allocator.release(row.pages)
        self.rows = rows
        self._table = None

    def unshare(self) -> None:
        """Gives each row pages of its own, copying what it shared."""
        for row in self.rows:
            if not any(self._allocator.is_shared(page) for page in row.pages):
                continue
            used = row.pages[: self._pages(row.length)]
            fresh = self._take(max(len(used), self._ahead))
            self.pool.copy_pages(used, fresh[: len(used)])
            self._allocator.release(row.pages)
            row.pages = fresh
        self._table = None

    def clear(self) -> None:
        """Forgets all rows; the pool's memory stays for the next ones."""
        for row in self.rows:
            self._allocator.release(row.pages)
        self.rows = []
        self._table = None

    def block_table(self, tokens: int) -> Tensor:
        """int32 [rows, 1, width] on the CPU, wide enough for rows of `tokens` tokens; 0 where a row has no page."""
        if self._table is None:
            width = max(len(row.pages) for row in self.rows)
            self._table = torch.zeros((len(self.rows), 1, width), dtype=torch.int32)
            for index, row in enumerate(self.rows):
                self._table[index, 0, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)
        return self._table[:, :, : self._pages(tokens)]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that hold tokens, shared ones once, over all layers, K and V."""
        used = {page for row in self.rows for page in row.pages[: self._pages(row.length)]}
        return len(used) * self.pool.bytes_a_page()

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of the whole pool; on a GPU it is all taken, on a CPU only what has been written."""
        return self.pool.n_pages * self.pool.bytes_a_page()

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _make_room(self, lengths: list[int]) -> None:
        """Gives every row the pages for its new length."""
        wanted = [self._pages_to_add(row, length) for row, length in zip(self.rows, lengths, strict=True)]
        if not any(wanted):
            return
        missing = sum(wanted) - (self._allocator.n_pages - self._allocator.n_used)
        if missing > 0:
            self._grow(self._allocator.n_pages + missing)
        for row, count in zip(self.rows, wanted, strict=True):
            if count:
                row.pages += self._take(count, after=row.pages[-1] if row.pages else None)
        self._table = None

    def _pages_to_add(self, row: Row, length: int) -> int:
        """A new row gets all it is expected to need; one that outgrows its pages gets half as many again."""
        need = self._pages(length)
        if need <= len(row.pages):
            return 0
        if not row.pages:
            return max(need, self._ahead)
        return max(need - len(row.pages), len(row.pages) // 2)

    def _own_page(self, row: Row, index: int) -> None:
        """Before a row writes into a page that others read, it gets a copy of its own."""
        if self._allocator.is_shared(page := row.pages[index]):
            (fresh,) = self._take(1)
            self.pool.copy_pages([page], [fresh])
            self._allocator.release([page])
            row.pages[index] = fresh
            self._table = None

    def _take(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages: side by side if possible, else scattered, else after growing the pool."""
        pages = self._allocator.take(count, after) or self._allocator.take_scattered(count)
        if pages is None:
            self._grow(self._allocator.n_pages + count)
            pages = self._allocator.take(count, after)
        assert pages is not None
        return pages

    def _grow(self, n_pages: int) -> None:
        current = self._allocator.n_pages
        target = max(n_pages, current + current // GROWTH_SHARE)
        self.pool.grow(target)
        self._allocator.grow(target)
