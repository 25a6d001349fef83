"""decode_attention and decode_attention_stats against the dense reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import (
    ATTENTION,
    CASES,
    GROUPED,
    OWN,
    STATS,
    Op,
    make_case,
    reference,
    tensors,
    with_two_threads,
)
from paged_inputs import LENGTHS, absolute, make_paged
from torch import Tensor

from deltakv import ops
from deltakv.ops.decode_attention import flash
from deltakv.ops.decode_attention.naive import decode_attention as naive_attention
from deltakv.ops.decode_attention.naive import decode_attention_stats as naive_stats


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("case", CASES)
def test_output_equals_dense_reference(op: Op, case: str) -> None:
    batch = make_case(case, seed=len(case))
    out = op(*batch.arguments)
    assert out.shape == batch.q.shape and out.dtype == batch.q.dtype
    tolerance = 3e-4 if "sharp" in case else 1e-5
    torch.testing.assert_close(out.double(), reference(batch)[0], rtol=0, atol=tolerance)
    assert (out[batch.seq_lens[:, 0] == 0] == 0).all(), "a row that sees nothing gives zeros"


@pytest.mark.parametrize("op", STATS)
@pytest.mark.parametrize("case", CASES)
def test_statistics_equal_dense_reference(op: Op, case: str) -> None:
    batch = make_case(case, seed=100 + len(case))
    out, relative, peaks, lse = op(*batch.arguments)
    logits = absolute(relative, peaks)
    want_out, want_logits, want_lse = reference(batch)
    rows, n_heads, _ = batch.q.shape
    tokens = batch.block_table.shape[2] * batch.k_cache.shape[1]
    assert out.dtype == batch.q.dtype and logits.dtype == lse.dtype == torch.float32
    assert logits.shape == (rows, n_heads, tokens) and lse.shape == (rows, n_heads)
    sharp = "sharp" in case
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=3e-4 if sharp else 1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=2e-4 if sharp else 1e-5)
    for row, length in enumerate(batch.seq_lens[:, 0].tolist()):
        assert (logits[row, :, length:] == -math.inf).all(), f"row {row} of length {length}"
        torch.testing.assert_close(
            logits[row, :, :length].double(),
            torch.stack(want_logits[row]),
            rtol=1e-6,
            atol=2e-4 if sharp else 1e-5,
        )


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "page_size, head_dim, n_kv, layout", [(16, 16, 2, "plain"), (32, 64, 4, OWN), (16, 80, 6, "interleaved")]
)
@pytest.mark.parametrize(
    "attend, stats",
    [
        pytest.param(ops.decode_attention, ops.decode_attention_stats, id="registered"),
        pytest.param(flash.decode_attention, flash.decode_attention_stats, id="pytorch"),
        pytest.param(naive_attention, naive_stats, id="naive"),
    ],
)
def test_head_groups_have_their_own_pages(
    attend: Op, stats: Op, page_size: int, head_dim: int, n_kv: int, layout: str, sinks: bool
) -> None:
    shape = {"n_heads": 2 * n_kv, "n_kv": n_kv, "page_size": page_size, "head_dim": head_dim}
    batch = make_paged(GROUPED, groups=2, sinks=sinks, layout=layout, **shape)
    want_out, want_logits, want_lse = reference(batch)
    torch.testing.assert_close(attend(*batch.arguments).double(), want_out, rtol=0, atol=1e-5)
    out, relative, peaks, lse = stats(*batch.arguments)
    logits = absolute(relative, peaks)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)
    for row, lengths in enumerate(batch.seq_lens.tolist()):
        for head in range(2 * n_kv):
            length = lengths[head // n_kv]
            got = logits[row, head]
            assert (got[length:] == -math.inf).all()
            torch.testing.assert_close(got[:length].double(), want_logits[row][head], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("op", ATTENTION)
def test_one_group_for_each_kv_head(op: Op) -> None:
    lengths = [[5, 17, 33, 0], [100, 1, 16, 48], [64, 65, 66, 67]]
    batch = make_paged(lengths, n_heads=8, n_kv=4, groups=4, table="shared", layout="interleaved")
    torch.testing.assert_close(op(*batch.arguments).double(), reference(batch)[0], rtol=0, atol=1e-5)


def check_bfloat16(op: Op, longest: int, **options: Any) -> None:
    """Error against the exact result: at most 1.5 times that of torch's bf16 attention on the same inputs."""
    each = 4
    lengths = [n for n in (1, 15, 17, 33, 64, 100, 257, 1000, 1025, 4200) if n <= longest for _ in range(each)]
    batch = make_paged(lengths, dtype=torch.bfloat16, **options)
    exact = reference(batch)[0]
    stock = torch.stack(
        [
            torch.nn.functional.scaled_dot_product_attention(
                batch.q[row][None, :, None],
                *(x[row][0].transpose(0, 1)[None] for x in (batch.keys, batch.values)),
                scale=batch.scale,
                enable_gqa=True,
            )[0, :, 0]
            for row in range(len(lengths))
        ]
    )
    out = op(*batch.arguments)
    assert out.dtype == torch.bfloat16
    ours, theirs = (out.double() - exact).abs(), (stock.double() - exact).abs()
    assert theirs.max() < 0.02, "the yardstick itself must be sound"

    def by_length(error: Tensor) -> Tensor:
        return error.square().mean(dim=(1, 2)).view(-1, each).mean(dim=1).sqrt()

    assert (by_length(ours) <= 1.5 * by_length(theirs) + 1e-5).all(), "root mean square, by length"
    assert ours.max() <= 1.5 * theirs.max() + 1e-3, f"largest: {ours.max():.4f} and {theirs.max():.4f}"


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("head_dim, n_heads, n_kv", [(64, 8, 2), (128, 4, 4), (80, 6, 1)])
@pytest.mark.parametrize("page_size, table, layout", [(16, "permuted", "plain"), (32, "halves", OWN)])
def test_bfloat16_is_as_good_as_stock_attention(
    op: Op, head_dim: int, n_heads: int, n_kv: int, page_size: int, table: str, layout: str
) -> None:
    shape = {"n_heads": n_heads, "n_kv": n_kv, "head_dim": head_dim}
    longest = 300 if op is naive_attention else 4200  # the naive version gathers all rows at full width
    check_bfloat16(op, longest, page_size=page_size, table=table, layout=layout, **shape)


@pytest.mark.parametrize("op", [ops.decode_attention, flash.decode_attention])
def test_bfloat16_is_as_good_as_stock_attention_with_threads(op: Op) -> None:
    """More threads than KV heads: what a kernel cuts up for them, it may not round twice."""
    op = with_two_threads(op)
    check_bfloat16(op, 4200, n_heads=8, n_kv=1, head_dim=64, layout=OWN, table="contiguous")


@pytest.mark.parametrize("op", STATS)
@pytest.mark.parametrize("sinks", [False, True])
def test_bfloat16_statistics_are_float32(op: Op, sinks: bool) -> None:
    """Logits and lse of bf16 inputs are not rounded to bf16 on the way: picks rest on them."""
    batch = make_paged(LENGTHS, head_dim=64, dtype=torch.bfloat16, sinks=sinks)
    out, relative, peaks, lse = op(*batch.arguments)
    logits = absolute(relative, peaks)
    want_out, want_logits, want_lse = reference(batch)
    assert out.dtype == torch.bfloat16 and logits.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want_out, rtol=1e-2, atol=1e-2)
    for attend in (ops.decode_attention, naive_attention):
        torch.testing.assert_close(attend(*batch.arguments).double(), want_out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)
    for row, length in enumerate(batch.seq_lens[:, 0].tolist()):
        want = torch.stack(want_logits[row])
        torch.testing.assert_close(logits[row, :, :length].double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("op", [*ATTENTION, *STATS])
def test_strided_queries_and_arguments_left_alone(op: Op) -> None:
    """q as transformers gives it, heads before rows; and no argument is written to."""
    batch = make_paged(LENGTHS, head_dim=64, sinks=True)
    before = [x.clone() if isinstance(x, Tensor) else x for x in batch.arguments]
    plain = op(*batch.arguments)
    batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not batch.q.is_contiguous()
    strided = op(*batch.arguments)
    for a, b in zip(tensors(plain), tensors(strided), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for x, y in zip(before, batch.arguments, strict=True):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("op", ATTENTION)
def test_only_empty_rows(op: Op) -> None:
    batch = make_paged([0, 0, 0])
    assert torch.equal(op(*batch.arguments), torch.zeros_like(batch.q))


@pytest.mark.parametrize("op", [*ATTENTION, *STATS])
def test_no_rows(op: Op) -> None:
    batch = make_paged([40, 17])
    shapes = [(0, *x.shape[1:]) for x in tensors(op(*batch.arguments))]
    assert [x.shape for x in tensors(op(*batch.rows([])))] == shapes


@pytest.mark.parametrize("op", STATS)
@pytest.mark.parametrize("sinks", [False, True])
def test_statistics_of_only_empty_rows(op: Op, sinks: bool) -> None:
    batch = make_paged([0, 0, 0], sinks=sinks)
    out, relative, peaks, lse = op(*batch.arguments)
    logits = absolute(relative, peaks)
    assert torch.equal(out, torch.zeros_like(batch.q)) and (logits == -math.inf).all()
    want = torch.full((3, 4), -math.inf) if batch.sinks is None else batch.sinks.expand(3, 4)
    torch.testing.assert_close(lse, want)


OPCHECKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"sinks": True, "layout": "interleaved"},
    "groups": {"groups": 2, "layout": "heads_first"},
    "own": {"layout": OWN, "groups": 2},
    "bfloat16": {"dtype": torch.bfloat16, "table": "shared"},
}


@pytest.mark.parametrize("name", ["decode_attention", "decode_attention_stats"])
@pytest.mark.parametrize("case", OPCHECKS)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(name: str, case: str, strided: bool) -> None:
    batch = make_paged([40, 17, 1], **OPCHECKS[case])
    # opcheck compares tensors with allclose, to which NaN is a difference: fill what is never read.
    batch.k_cache.nan_to_num_(0.0)
    batch.v_cache.nan_to_num_(0.0)
    if strided:
        batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(getattr(torch.ops.deltakv, name).default, batch.arguments)


def test_opcheck_into() -> None:
    batch = make_paged([40, 17, 1], layout="interleaved")
    batch.k_cache.nan_to_num_(0.0)
    batch.v_cache.nan_to_num_(0.0)
    out = torch.zeros_like(batch.q)
    torch.library.opcheck(torch.ops.deltakv.decode_attention_into.default, (*batch.arguments, out, 64))
    torch.ops.deltakv.decode_attention_into(*batch.arguments, out, 64)
    assert torch.equal(out, torch.ops.deltakv.decode_attention(*batch.arguments))


def test_fake_outputs() -> None:
    batch = make_paged([40, 17, 1], dtype=torch.bfloat16)
    q, k, v, table, lens, scale, sinks = (x.to("meta") if isinstance(x, Tensor) else x for x in batch.arguments)
    out = torch.ops.deltakv.decode_attention(q, k, v, table, lens, scale, sinks)
    assert out.device.type == "meta" and out.shape == batch.q.shape and out.dtype == torch.bfloat16
    out, logits, peaks, lse = torch.ops.deltakv.decode_attention_stats(q, k, v, table, lens, scale, sinks)
    assert out.shape == batch.q.shape and out.dtype == torch.bfloat16
    assert logits.shape == (3, 1, 4, table.shape[2] * 16) and logits.dtype == torch.float32
    assert peaks.shape == (3, 1, 4) and peaks.dtype == torch.float32
    assert lse.shape == (3, 4) and lse.dtype == torch.float32
