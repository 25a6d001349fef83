"""Whatever stands beside a row of decode attention, and wherever its pages lie: the row has the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    ATTENTION,
    CASES,
    GROUPED,
    OWN,
    RUNNING,
    STATS,
    Op,
    make_case,
    reference,
    tensors,
    with_two_threads,
)
from paged_inputs import LENGTHS, LONG, make_paged
from torch import Tensor


def assert_same_bits(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...], what: str) -> None:
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(a, b), f"{what}: differs by up to {(a - b).abs().nan_to_num().max()}"


@pytest.mark.parametrize("op", RUNNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("page-128", "flat", "sharp")])
def test_a_row_does_not_depend_on_its_batch(op: Op, case: str, dtype: torch.dtype) -> None:
    """Bitwise: alone, in another order, and beside other neighbours."""
    batch = make_case(case, seed=7, dtype=dtype)
    n_rows = len(batch.q)
    together = tensors(op(*batch.arguments))
    others = [n_rows - 4] * 20 + list(range(0, n_rows, 2))
    for rows in (list(reversed(range(n_rows))), others, *([row] for row in range(n_rows))):
        assert_same_bits(op(*batch.rows(rows)), tuple(x[rows] for x in together), f"rows {rows}")


@pytest.mark.parametrize("op", RUNNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_kv", [1, 2])
@pytest.mark.parametrize("equal", [False, True])
def test_a_row_does_not_depend_on_its_batch_with_threads(op: Op, dtype: torch.dtype, n_kv: int, equal: bool) -> None:
    """Rows of one length that lie side by side may be read in one go, and each thread's buffer may begin anywhere."""
    lengths = [333] * 5 if equal else [300, 17, 1100, 1100, 1025, 1000, 64]
    table = "contiguous" if equal else "permuted"
    batch = make_paged(lengths, head_dim=64, n_heads=4 * n_kv // 2, n_kv=n_kv, layout=OWN, dtype=dtype, table=table)
    op = with_two_threads(op)
    torch.testing.assert_close(
        tensors(op(*batch.arguments))[0].double(),
        reference(batch)[0],
        rtol=0,
        atol=1e-5 if dtype == torch.float32 else 2e-2,
    )
    together = tensors(op(*batch.arguments))
    for rows in ([0], [2], [4], [3, 1], [4, 3, 2, 1, 0]):
        assert_same_bits(op(*batch.rows(rows)), tuple(x[rows] for x in together), f"rows {rows}")


@pytest.mark.parametrize("op", RUNNING)
def test_one_head_and_many_threads(op: Op) -> None:
    """A row alone leaves threads idle, a batch does not: that may not decide how a row is cut."""
    batch = make_paged([511, 512, 513, 1000] * 2, head_dim=64, n_heads=1, n_kv=1, layout=OWN)
    op = with_two_threads(op)
    together = tensors(op(*batch.arguments))
    for row in range(8):
        assert_same_bits(op(*batch.rows([row])), tuple(x[[row]] for x in together), f"row {row}")


@pytest.mark.parametrize("op", RUNNING)
def test_head_groups_do_not_depend_on_the_batch(op: Op) -> None:
    batch = make_paged(GROUPED, n_heads=8, n_kv=4, groups=2, head_dim=64, layout=OWN)
    together = tensors(op(*batch.arguments))
    for row in range(len(GROUPED)):
        assert_same_bits(op(*batch.rows([row])), tuple(x[[row]] for x in together), f"row {row}")


@pytest.mark.parametrize("op", RUNNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [pytest.param(LENGTHS, id="short"), pytest.param(LONG, id="long")])
@pytest.mark.parametrize("table", ["permuted", "halves"])
@pytest.mark.parametrize("layout", ["interleaved", OWN])
def test_a_row_does_not_depend_on_where_its_pages_lie(
    op: Op, dtype: torch.dtype, lengths: tuple[int, ...], table: str, layout: str
) -> None:
    """Bitwise: which pages of the pool a row was given follows from its neighbours, so it may not show."""
    in_order = make_paged(lengths, head_dim=64, table="contiguous", layout=layout, dtype=dtype)
    elsewhere = make_paged(lengths, head_dim=64, table=table, layout=layout, dtype=dtype)
    assert torch.equal(in_order.q, elsewhere.q) and torch.equal(in_order.keys[-1][0], elsewhere.keys[-1][0])
    want, got = tensors(op(*in_order.arguments)), tensors(op(*elsewhere.arguments))
    for row, length in enumerate(lengths):
        assert_same_bits(tuple(x[row] for x in got), tuple(x[row] for x in want), f"row of {length} tokens")


@pytest.mark.parametrize("op", [*ATTENTION, *STATS])
def test_what_lies_behind_the_table_changes_nothing(op: Op) -> None:
    """Other garbage in the unused table entries, bit for bit the same result."""
    batch = make_paged(LENGTHS, seed=3)
    first = op(*batch.arguments)
    for row, length in enumerate(batch.seq_lens[:, 0].tolist()):
        batch.block_table[row, 0, math.ceil(length / 16) :] = row % len(batch.k_cache)
    assert_same_bits(op(*batch.arguments), first, "other entries")


@pytest.mark.parametrize("op", RUNNING)
def test_called_in_inference_mode_first(op: Op) -> None:
    """Buffers that are kept from call to call can be written in either mode."""
    batch = make_paged([61, 61], n_heads=6, n_kv=3, head_dim=48, layout=OWN, table="permuted")
    with torch.inference_mode():
        first = op(*batch.arguments)
    assert_same_bits(op(*batch.arguments), first, "without inference mode")
