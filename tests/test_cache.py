"""The page allocator and the rows, against plain Python models of them, over random sequences of operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deltakv.cache import PagedKV
from deltakv.cache.allocator import PageAllocator
from deltakv.cache.pool import KVPool
from rows_machine import PAGE, SETTINGS, StoredRows

LAYERS = 2


class AllocatorMachine(RuleBasedStateMachine):
    """The model is a list: how many users each page has."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(24)
        self.users = [0] * 24

    def took(self, pages: list[int]) -> None:
        assert all(self.users[page] == 0 for page in pages), "a page in use was given away"
        assert len(set(pages)) == len(pages)
        for page in pages:
            self.users[page] = 1

    def runs(self) -> int:
        """The longest run of free pages."""
        longest = current = 0
        for users in self.users:
            current = current + 1 if users == 0 else 0
            longest = max(longest, current)
        return longest

    @rule(count=st.integers(1, 6))
    def take(self, count: int) -> None:
        pages = self.allocator.take(count)
        if pages is None:
            assert self.runs() < count
            return
        assert pages == list(range(pages[0], pages[0] + count)), "not one run"
        self.took(pages)

    @rule(page=st.integers(0, 23), count=st.integers(1, 6))
    def take_after(self, page: int, count: int) -> None:
        pages = self.allocator.take_after(page, count)
        free = self.users[page + 1 : page + 1 + count] == [0] * count
        assert pages == (list(range(page + 1, page + 1 + count)) if free else None)
        self.took(pages or [])

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def share_or_release(self, data: st.DataObject) -> None:
        used = [page for page, users in enumerate(self.users) if users]
        pages = data.draw(st.lists(st.sampled_from(used), unique=True))
        if data.draw(st.booleans()):
            self.allocator.share(pages)
            step = 1
        else:
            self.allocator.release(pages)
            step = -1
        for page in pages:
            self.users[page] += step

    @invariant()
    def agrees(self) -> None:
        assert self.allocator.n_pages == len(self.users)
        assert self.allocator.n_used == sum(users > 0 for users in self.users)
        assert [self.allocator.is_shared(page) for page in range(len(self.users))] == [u > 1 for u in self.users]


def test_allocator() -> None:
    run_state_machine_as_test(AllocatorMachine, settings=SETTINGS)


def test_releasing_a_free_page_is_an_error() -> None:
    allocator = PageAllocator(2)
    pages = allocator.take(1)
    assert pages is not None
    allocator.release(pages)
    with pytest.raises(AssertionError, match="more often than it was taken"):
        allocator.release(pages)


class RowsMachine(StoredRows):
    """Of layers that share their pages' numbers."""

    def __init__(self) -> None:
        super().__init__(PagedKV(LAYERS, PAGE), range(LAYERS))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        lengths = [data.draw(st.integers(0, len(row) + 5)) for row in self.model]
        self.kv.truncate(lengths)
        self.model = [row[:length] for row, length in zip(self.model, lengths, strict=True)]

    def unshared(self) -> None:
        pages = [page for row in self.kv.rows for page in row.pages]
        assert len(set(pages)) == len(pages)

    @rule(tokens=st.integers(0, 150))
    def reserve(self, tokens: int) -> None:
        self.kv.reserve(tokens)

    @precondition(lambda self: self.model)
    @rule()
    def clear(self) -> None:
        self.kv.clear()
        self.model = []

    @invariant()
    def content(self) -> None:
        assert [row.length for row in self.kv.rows] == [len(row) for row in self.model]
        if not any(self.model):
            return
        table = self.kv.block_table(max(len(row) for row in self.model))
        for index, row in enumerate(self.model):
            for layer in range(LAYERS):
                want = self.written(torch.tensor(row), layer)
                k, v = (pool[table[index, 0].long()].flatten(0, 1) for pool in self.kv.pool.layer(layer))
                assert torch.equal(k[: len(row)], want) and torch.equal(v[: len(row)], -want)

    @invariant()
    def pages(self) -> None:
        """Every page has exactly the users that rows say, so nothing leaks and nothing is free that is in use."""
        users: dict[int, int] = {}
        for row in self.kv.rows:
            assert len(row.pages) * PAGE >= row.length
            for page in row.pages:
                users[page] = users.get(page, 0) + 1
        allocator = self.kv._allocator
        assert allocator.n_pages == self.kv.pool.n_pages
        assert allocator.n_used == len(users)
        assert all(allocator.is_shared(page) == (count > 1) for page, count in users.items())

    @invariant()
    def bytes_in_use(self) -> None:
        held = {page for row in self.kv.rows for page in row.pages[: -(-row.length // PAGE)]}
        written = self.kv.pool.k[0] is not None
        assert self.kv.nbytes == (len(held) * PAGE * 2 * 4 * 4 * 2 * LAYERS if written else 0)


def test_rows() -> None:
    run_state_machine_as_test(RowsMachine, settings=SETTINGS)


def test_slots_are_those_of_the_layout_that_stays() -> None:
    """The third of three rows that share a page finds the pool full: all rows move, the first two among them."""
    kv = PagedKV(1, PAGE)
    first = kv.begin([1])
    kv.pool.ensure_layer(0, torch.zeros(1, 1, 4))
    kv.commit(first.lengths)
    kv.rearrange([0] * 12)
    slots = [slot for row in kv.begin([1] * 12).slots for slot in row]
    assert len(set(slots)) == 12
    assert [slot // PAGE for slot in slots] == [row.pages[0] for row in kv.rows]


class BeamsMachine(RowsMachine):
    """The same with few rows that are always reordered: sharing at its densest."""

    @initialize()
    def prompt(self) -> None:
        self.model = [[], []]
        self.step([37, 20])
        self.kv.rearrange([0, 0, 1])
        self.model = [list(self.model[index]) for index in (0, 0, 1)]


def test_beams() -> None:
    run_state_machine_as_test(BeamsMachine, settings=SETTINGS)


def test_a_reserved_row_is_one_run() -> None:
    """Rows of a batch get the pages that they will need side by side, so each is read in place."""
    kv = PagedKV(1, PAGE)
    kv.reserve(300)
    kv.commit(kv.begin([40, 3, 120]).lengths)
    for _ in range(100):
        kv.commit(kv.begin([1, 1, 1]).lengths)
    for row in kv.rows:
        assert row.pages == list(range(row.pages[0], row.pages[0] + 19))
    assert kv.pool.n_pages == 57


def test_growth_is_geometric() -> None:
    """A row that nobody announced: the pool is copied a few times, not once a page."""
    kv = PagedKV(1, PAGE)
    sizes = set()
    for _ in range(2000):
        kv.commit(kv.begin([1]).lengths)
        sizes.add(kv.pool.n_pages)
    assert len(sizes) < 20
    assert max(sizes) < 2 * 2000 / PAGE


def test_table_is_as_wide_as_asked_and_safe_beyond() -> None:
    """Entries beyond a row's pages are 0, a page that exists, so that nothing reads out of bounds."""
    kv = PagedKV(1, PAGE)
    kv.commit(kv.begin([40, 3]).lengths)
    table = kv.block_table(40)
    assert table.dtype == torch.int32 and table.shape == (2, 1, 3)
    assert (table >= 0).all() and (table < kv.pool.n_pages).all()
    assert kv.block_table(33).shape == (2, 1, 3)
    assert kv.block_table(32).shape == (2, 1, 2)


def test_layers_may_differ() -> None:
    """Heads, sizes and dtypes by layer; page numbers mean the same in all, also after growing and copying."""
    pool = KVPool(3, PAGE)
    pool.move(2, [], [])
    like = [torch.zeros(2, 1, 8), torch.zeros(1, 1, 4, dtype=torch.bfloat16)]
    for layer, new in enumerate(like):
        k, v = pool.ensure_layer(layer, new)
        k[:] = layer + 1
        v[:] = layer + 5
    pool.move(5, [0, 1], [3, 0])
    for layer, new in enumerate(like):
        k, v = pool.layer(layer)
        assert k.shape == (5, PAGE, new.shape[0], new.shape[2]) and k.dtype == v.dtype == new.dtype
        assert (k[[0, 3]] == layer + 1).all() and (v[[0, 3]] == layer + 5).all()
    pool.copy_pages([3], [4])
    assert (pool.layer(1)[1][4] == 6).all()
    assert pool.bytes_a_page() == 2 * PAGE * (2 * 8 * 4 + 4 * 2)
    with pytest.raises(AssertionError, match="layer 2 has no K and V yet"):
        pool.layer(2)


def test_a_batch_keeps_its_size() -> None:
    kv = PagedKV(1, PAGE)
    kv.commit(kv.begin([4, 4]).lengths)
    with pytest.raises(AssertionError, match="batch size"):
        kv.begin([1, 1, 1])
