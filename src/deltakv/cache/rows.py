"""The paged KV cache: rows of tokens in a pool, addressed through block tables.

Rows are stored without padding: a row's first token is its first real one. A step appends tokens to the rows with
`begin`, which hands out slots and tables; `commit` makes it count. A step that fails half way is simply never
committed, and the next `begin` starts from where the last one that succeeded ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deltakv.cache.allocator import PageAllocator
from deltakv.cache.pool import KVPool

#: In the place of a page that its row has given up.
GONE = -1

#: Room beyond what rows hold when they are laid out anew: a half. So copying stays a constant share of writing.
SPARE = 2


@dataclass
class Row:
    """One sequence: its pages in order (some may lie ahead, still empty; some may be `GONE`) and its tokens, those on
    pages that are gone included."""

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


class RowStore(Protocol):
    """Where the rows of a batch are: a pool of pages, or host memory. Its methods: see `PagedKV`."""

    page_size: int

    @property
    def rows(self) -> list[Row]: ...
    def reserve(self, tokens: int) -> None: ...
    def begin(self, counts: list[int]) -> Append: ...
    def commit(self, lengths: list[int]) -> None: ...
    def truncate(self, lengths: list[int]) -> None: ...
    def rearrange(self, indices: list[int]) -> None: ...
    def unshare(self) -> None: ...
    def clear(self) -> None: ...
    def block_table(self, tokens: int | None = None) -> Tensor: ...
    @property
    def nbytes(self) -> int: ...


class PagedKV:
    """All rows of a batch in one pool.

    n_layers: layers that store here. page_size: tokens a page.
    """

    # _table: int32 [rows, width], each row's pages, `GONE` where it has none; None if it must be made anew. _stale: the
    # rows that have changed since, each from that place on.

    def __init__(self, n_layers: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = KVPool(n_layers, page_size)
        self.rows: list[Row] = []
        self._allocator = PageAllocator()
        self._ahead = 0
        self._table: Tensor | None = None
        self._stale: dict[int, int] = {}

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
        for index, (old, new) in enumerate(zip(past, lengths, strict=True)):
            if new > old and old % self.page_size:
                self._own_page(index, old // self.page_size)
        size = self.page_size  # slots last, because a page of one's own may take a new layout of all rows
        slots = [
            [row.pages[token // size] * size + token % size for token in range(old, new)]
            for row, old, new in zip(self.rows, past, lengths, strict=True)
        ]
        return Append(past, lengths, slots)

    def commit(self, lengths: list[int]) -> None:
        """The tokens up to `lengths[r]` now belong to row r; room was made for them."""
        for row, length in zip(self.rows, lengths, strict=True):
            assert length <= len(row.pages) * self.page_size, "a row cannot hold more than its pages"
            row.length = length

    def truncate(self, lengths: list[int]) -> None:
        """Drops the tokens of each row from `lengths[r]` on. Its pages stay with it, but for those that others read."""
        for row, length in zip(self.rows, lengths, strict=True):
            if length >= row.length:
                continue
            row.length = length
            used = self._pages(row.length)
            ahead = _held(row.pages[used:])
            if any(self._allocator.is_shared(page) for page in ahead):
                self._allocator.release(ahead)
                ahead = []
            if len(row.pages) != used + len(ahead):
                row.pages[used:] = ahead
                self._table = None

    def give_up(self, index: int, numbers: list[int]) -> None:
        """Pages of a row, by their place in it, that it will never read again; not its last one. They are free for
        others from now on."""
        pages = self.rows[index].pages
        self._allocator.release([pages[number] for number in numbers])
        for number in numbers:
            pages[number] = GONE
        self._changed(index, min(numbers))

    def shrink(self) -> None:
        """Lays the rows out anew if pages that were given up have left the pool mostly empty."""
        # What lies ahead of a row's tokens is never gone.
        held = sum(self._pages(row.length) - row.pages.count(GONE) for row in self.rows)
        if self.pool.n_pages > SPARE * (held + held // SPARE + len(self.rows)):
            self._ahead = 0
            self._lay_out([row.length for row in self.rows])

    def rearrange(self, indices: list[int]) -> None:
        """New row i is old row `indices[i]`. Rows made from the same one share its pages until they write."""
        old = self.rows
        kept: set[int] = set()
        rows = []
        for index in indices:
            pages = old[index].pages
            if index in kept:
                pages = pages[: self._pages(old[index].length)]
                self._allocator.share(_held(pages))
            kept.add(index)
            rows.append(Row(list(pages), old[index].length))
        for index, row in enumerate(old):
            if index not in kept:
                self._allocator.release(_held(row.pages))
        self.rows = rows
        self._table = None

    def unshare(self) -> None:
        """Gives each row pages of its own, copying what it shared."""
        self._lay_out([row.length for row in self.rows], unshare=True)

    def clear(self) -> None:
        """Forgets all rows; the pool's memory stays for the next ones."""
        for row in self.rows:
            self._allocator.release(_held(row.pages))
        self.rows = []
        self._table = None

    @property
    def room(self) -> int:
        """Tokens that every row can take in before any needs another page."""
        return min(len(row.pages) * self.page_size - row.length for row in self.rows)

    def block_table(self, tokens: int | None = None) -> Tensor:
        """int32 [rows, 1, width] on the CPU, wide enough for rows of `tokens` tokens, or for all that they have room
        for; 0 where a row has no page, or none any more."""
        table = self.held()
        return (table if tokens is None else table[:, : self._pages(tokens)]).clamp_min(0)[:, None]

    def held(self) -> Tensor:
        """int32 [rows, width] on the CPU: the rows' pages, `GONE` where there is none. To be read at once: the next
        step changes it."""
        width = max(len(row.pages) for row in self.rows)
        if self._table is None:
            self._table = torch.full((len(self.rows), width), GONE, dtype=torch.int32)
            self._stale = dict.fromkeys(range(len(self.rows)), 0)
        elif self._table.shape[1] < width:
            self._table = torch.nn.functional.pad(self._table, (0, width - self._table.shape[1]), value=GONE)
        for index, start in self._stale.items():
            pages = self.rows[index].pages
            self._table[index, start : len(pages)] = torch.tensor(pages[start:], dtype=torch.int32)
        self._stale = {}
        return self._table

    def _changed(self, index: int, start: int) -> None:
        """A row's pages from `start` on are others, and no fewer, than the table says."""
        self._stale[index] = min(start, self._stale.get(index, start))

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that hold tokens, shared ones once, over all layers, K and V."""
        ahead = sum(len(row.pages) - self._pages(row.length) for row in self.rows)  # never shared
        return (self._allocator.n_used - ahead) * self.pool.bytes_a_page()

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _make_room(self, lengths: list[int]) -> None:
        """Gives every row the pages for its new length."""
        for index, length in enumerate(lengths):
            need = self._pages(length)
            if need > len(self.rows[index].pages) and not self._extend(index, need):
                self._lay_out(lengths)
                return

    def _extend(self, index: int, need: int) -> bool:
        """Up to `need` pages for one row, if the pool has them where they should be: for a new row, all that it is
        expected to need, side by side; for an old one, right behind those that it has. A row that shares pages
        (a beam) or has given some up is in pieces anyway and takes what there is."""
        row = self.rows[index]
        if not row.pages:
            pages = self._allocator.take(max(need, self._ahead))
        else:
            missing = need - len(row.pages)
            pages = self._allocator.take_after(row.pages[-1], missing)
            if pages is None and (GONE in row.pages or any(map(self._allocator.is_shared, row.pages))):
                pages = self._allocator.take(missing)
        if pages is None:
            return False
        self._changed(index, len(row.pages))
        row.pages += pages
        return True

    def _lay_out(self, lengths: list[int], *, unshare: bool = False) -> None:
        """Moves all rows to a pool of the right size, each side by side with room to grow; shared pages stay shared."""
        source: list[int] = []
        target: list[int] = []
        moved: dict[int, int] = {}
        end = 0
        sharing = False
        laid_out = []
        for row, length in zip(self.rows, lengths, strict=True):
            used, need = row.pages[: self._pages(row.length)], self._pages(length)
            held = _held(used)
            if not unshare and any(self._allocator.is_shared(page) for page in held):
                sharing = True
                fresh = [page for page in held if page not in moved]
                moved |= zip(fresh, range(end, end + len(fresh)), strict=True)
                source += fresh
                target += range(end, end + len(fresh))
                end += len(fresh) + need - len(used)
                laid_out.append([moved.get(page, GONE) for page in used] + list(range(end - need + len(used), end)))
            else:
                room = max(need, self._ahead, len(used) + len(held) // SPARE) - (len(used) - len(held))
                places = iter(range(end, end + room))
                laid_out.append([GONE if page == GONE else next(places) for page in used] + list(places))
                source += held
                target += range(end, end + len(held))
                end += room
        n_pages = end + 1 + end // SPARE if sharing else end
        self.pool.move(n_pages, source, target)
        self._allocator = PageAllocator(n_pages)
        for row, pages in zip(self.rows, laid_out, strict=True):
            row.pages = pages
            self._allocator.share(_held(pages))
        self._table = None

    def _own_page(self, index: int, number: int) -> None:
        """Before a row writes into a page that others read, it gets a copy of its own. number: the page's place."""
        row = self.rows[index]
        page = row.pages[number]
        if not self._allocator.is_shared(page):
            return
        fresh = self._allocator.take(1)
        if fresh is None:
            self._lay_out([len(other.pages) * self.page_size for other in self.rows])
            page, fresh = row.pages[number], self._allocator.take(1)
            assert fresh is not None, "a new layout with shared pages has pages to spare"
        self.pool.copy_pages([page], fresh)
        self._allocator.release([page])
        row.pages[number] = fresh[0]
        self._changed(index, number)


def _held(pages: list[int]) -> list[int]:
    """Those that are not gone."""
    return [page for page in pages if page != GONE]
