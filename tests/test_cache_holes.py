"""Rows whose layers give up pages, against plain lists, over random sequences of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from deltakv.cache import PagedKV
from deltakv.cache.layered import LayeredRows
from deltakv.cache.rows import GONE
from rows_machine import PAGE, SETTINGS, StoredRows

LAYERS = (3, 5)


class HolesMachine(StoredRows):
    """Beside the values the model has, for each layer and row, the pages that are gone."""

    def __init__(self) -> None:
        super().__init__(LayeredRows(LAYERS, PAGE), LAYERS)
        self.gone: dict[int, list[set[int]]] = {layer: [] for layer in LAYERS}

    def slots(self, step: Any, layer: int) -> list[list[int]]:
        return self.kv.appends[layer].slots  # type: ignore[no-any-return]

    def step(self, counts: list[int]) -> None:
        for gone in self.gone.values():
            gone += [set() for _ in self.model[len(gone) :]]
        super().step(counts)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), layer=st.sampled_from(LAYERS), wider=st.integers(0, 3))
    def drop(self, data: st.DataObject, layer: int, wider: int) -> None:
        """Any pages but a row's last one; what is gone already is said again, as tallies do."""
        last = [max(len(row) - 1, 0) // PAGE for row in self.model]
        dropped = torch.zeros((len(self.model), max(last) + 1 + wider), dtype=torch.bool)
        for index, (pages, gone) in enumerate(zip(last, self.gone[layer], strict=True)):
            gone |= set(data.draw(st.lists(st.integers(0, pages - 1), max_size=pages)) if pages else [])
            dropped[index, sorted(gone)] = True
        self.kv.drop(layer, dropped)

    def rearranged(self, indices: list[int]) -> None:
        self.gone = {layer: [set(gone[index]) for index in indices] for layer, gone in self.gone.items()}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        """Not so far that a row's last page is one that is gone: the cache refuses that."""
        lengths = []
        for index, row in enumerate(self.model):
            holes = [page for gone in self.gone.values() for page in gone[index]]
            lengths.append(data.draw(st.integers(min((max(holes, default=-1) + 1) * PAGE + 1, len(row)), len(row))))
        self.kv.truncate(lengths)
        self.model = [row[:length] for row, length in zip(self.model, lengths, strict=True)]

    @precondition(lambda self: any(self.model))
    @invariant()
    def content(self) -> None:
        for layer in LAYERS:
            kv = self.kv.by_layer[layer]
            held = kv.held().clone()
            table = kv.block_table()
            assert torch.equal(table[:, 0], held.clamp_min(0))
            k, v = self.kv.pool.layer(layer)
            for index, (row, gone) in enumerate(zip(self.model, self.gone[layer], strict=True)):
                assert (held[index, len(kv.rows[index].pages) :] == GONE).all()
                assert {page for page in range(-(-len(row) // PAGE)) if held[index, page] == GONE} == gone
                at = torch.tensor([token for token in range(len(row)) if token // PAGE not in gone], dtype=torch.long)
                pages, want = table[index, 0, at // PAGE].long(), self.written(torch.tensor(row)[at], layer)
                assert torch.equal(k[pages, at % PAGE], want) and torch.equal(v[pages, at % PAGE], -want)

    @precondition(lambda self: self.model)
    @invariant()
    def pages(self) -> None:
        """Every page has exactly the users that rows say, so what was given up is free."""
        for kv in self.kv.by_layer.values():
            users = [page for row in kv.rows for page in row.pages if page != GONE]
            assert kv._allocator.n_used == len(set(users))
            holding = {page for row in kv.rows for page in row.pages[: -(-row.length // PAGE)] if page != GONE}
            assert kv.nbytes == len(holding) * kv.pool.bytes_a_page()
            assert all(kv._allocator.is_shared(page) == (users.count(page) > 1) for page in set(users))


def test_rows_with_holes() -> None:
    run_state_machine_as_test(HolesMachine, settings=SETTINGS)


def test_changes_between_two_looks_come_together() -> None:
    kv = PagedKV(1, PAGE)
    kv.commit(kv.begin([5 * PAGE, 3 * PAGE]).lengths)
    kv.block_table()
    kv.give_up(0, [1])
    kv.give_up(0, [3])
    want = [row.pages + [GONE] * (len(kv.rows[0].pages) - len(row.pages)) for row in kv.rows]
    assert [at for at, page in enumerate(want[0]) if page == GONE] == [1, 3]
    assert kv.held().tolist() == want


def test_rows_of_a_table_that_has_grown_wider_end_where_they_did() -> None:
    kv = PagedKV(1, PAGE)
    kv.commit(kv.begin([PAGE, 2 * PAGE]).lengths)
    kv.block_table()
    kv.commit(kv.begin([0, PAGE]).lengths)
    assert kv.held()[0].tolist() == [kv.rows[0].pages[0], GONE, GONE]


@pytest.mark.parametrize("dropped", [[], [0], [2, 3]])
def test_a_table_that_was_handed_out_stays_as_it_was(dropped: list[int]) -> None:
    """A step reads it on the device while the next one is laid out."""
    kv = PagedKV(1, PAGE)
    kv.begin([5 * PAGE, 3 * PAGE])
    kv.pool.ensure_layer(0, torch.zeros(1, 1, 4))
    kv.commit([5 * PAGE, 3 * PAGE])
    table = kv.block_table()
    before = table.clone()
    if dropped:
        kv.give_up(0, dropped)
    kv.begin([40, 1])
    kv.block_table()
    assert torch.equal(table, before)
