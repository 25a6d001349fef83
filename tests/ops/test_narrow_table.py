"""narrow_table against plain loops."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_ops
from torch import Tensor

from deltakv import ops
from deltakv.ops.narrow_table import naive

#: Where there is no GPU, Triton's interpreter runs.
OPS = [
    pytest.param(ops.narrow_table, id="registered"),
    pytest.param(naive.narrow_table, id="naive"),
    pytest.param(triton_ops.triton_op("narrow_table"), id="triton"),
]


def make_picks(lengths: list[int], page_size: int, width: int, room: int, seed: int) -> tuple[Tensor, ...]:
    """Rows that keep all their pages or `room` of them, the last one among them. Entries behind a row are poison."""
    chooser = random.Random(seed)
    rows = len(lengths)
    table = torch.full((rows, width), torch.iinfo(torch.int32).max, dtype=torch.int32)
    pages, n_kept = torch.zeros((rows, room), dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    for row, length in enumerate(lengths):
        n = -(-length // page_size)
        table[row, :n] = torch.tensor(chooser.sample(range(10 * width), n), dtype=torch.int32)
        kept = sorted([*chooser.sample(range(n - 1), min(n, room) - 1), n - 1]) if n else []
        n_kept[row] = len(kept)
        pages[row, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return table, torch.tensor(lengths, dtype=torch.int32), pages, n_kept


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("page_size", "width", "room"), [(16, 24, 4), (16, 24, 24), (32, 12, 1), (128, 5, 3), (16, 3000, 1100)]
)
def test_tables(op: Callable[..., Any], page_size: int, width: int, room: int) -> None:
    most = width * page_size
    lengths = [0, 1, page_size, page_size + 1, most // 2, most - 1, most, most, 0]
    whole = torch.tensor([False] * 7 + [True, True])
    whole[4] = True
    table, lens, pages, n_kept = make_picks(lengths, page_size, width, room, seed=width)
    got, tokens = op(table, lens, pages, n_kept, whole, page_size)
    assert got.shape == table.shape and got.dtype == tokens.dtype == torch.int32
    for row, length in enumerate(lengths):
        logical = range(-(-length // page_size)) if whole[row] else pages[row, : n_kept[row]].tolist()
        assert got[row, : len(logical)].tolist() == [int(table[row, page]) for page in logical]
        held = [token for page in logical for token in range(page * page_size, (page + 1) * page_size)]
        assert int(tokens[row]) == sum(token < length for token in held)


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op: Callable[..., Any]) -> None:
    table, lens, pages, n_kept = make_picks([], 16, 8, 4, seed=0)
    got, tokens = op(table, lens, pages, n_kept, torch.zeros(0, dtype=torch.bool), 16)
    assert got.shape == (0, 8) and tokens.shape == (0,)


def test_opcheck() -> None:
    table, lens, pages, n_kept = make_picks([0, 40, 384], 16, 24, 4, seed=1)
    arguments = (table, lens, pages, n_kept, torch.tensor([False, True, False]), 16)
    torch.library.opcheck(torch.ops.deltakv.narrow_table.default, arguments)
