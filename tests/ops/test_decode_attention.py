"""decode_attention and decode_attention_stats against the dense reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_ops
from paged_inputs import EQUAL, LENGTHS, LONG, Paged, absolute, make_paged
from torch import Tensor

from deltakv import ops
from deltakv.ops.decode_attention import flash
from deltakv.ops.decode_attention.naive import decode_attention as naive_attention
from deltakv.ops.decode_attention.naive import decode_attention_stats as naive_stats
from oracle import attention

Op = Callable[..., Any]
ATTENTION = [
    pytest.param(ops.decode_attention, id="registered"),
    pytest.param(flash.decode_attention, id="pytorch"),
    pytest.param(triton_ops.attention, id="triton", marks=pytest.mark.gpu),
    pytest.param(naive_attention, id="naive"),
]
STATS = [
    pytest.param(ops.decode_attention_stats, id="registered"),
    pytest.param(flash.decode_attention_stats, id="pytorch"),
    pytest.param(naive_stats, id="naive"),
]
#: What applications run; the naive versions say what is meant and promise no bits.
RUNNING = [
    pytest.param(ops.decode_attention, id="attention"),
    pytest.param(ops.decode_attention_stats, id="stats"),
    pytest.param(flash.decode_attention, id="pytorch-attention"),
    pytest.param(flash.decode_attention_stats, id="pytorch-stats"),
    pytest.param(triton_ops.attention, id="triton-attention", marks=pytest.mark.gpu),
    pytest.param(triton_ops.attention_stats, id="triton-stats", marks=pytest.mark.gpu),
]

#: The layout of the library's own pool.
OWN = "heads_outermost"

#: What is varied in one random batch over LENGTHS; every value stands beside several others.
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"n_heads": 4, "n_kv": 4, "head_dim": 64, "table": "contiguous", "layout": OWN},
    "mqa": {"n_heads": 5, "n_kv": 1, "head_dim": 80, "page_size": 32, "table": "shared"},
    "wide": {"n_heads": 12, "n_kv": 2, "head_dim": 128, "layout": "interleaved", "table": "shared"},
    "sinks": {"sinks": True, "layout": "heads_first", "table": "shared"},
    "sinks-wide": {"n_heads": 8, "n_kv": 2, "head_dim": 64, "page_size": 64, "sinks": True, "layout": OWN},
    "page-32": {"page_size": 32, "layout": "interleaved", "head_dim": 80, "table": "contiguous"},
    "page-32-shared": {"page_size": 32, "layout": OWN, "head_dim": 80, "table": "shared", "n_heads": 6, "n_kv": 3},
    "page-64": {"page_size": 64, "layout": "heads_first", "head_dim": 128},
    "page-128": {"page_size": 128, "layout": "interleaved", "table": "shared", "extra_width": 0},
    "exact-width": {"extra_width": 0, "table": "contiguous", "n_heads": 2, "n_kv": 1},
    "very-wide": {"extra_width": 200, "head_dim": 64, "layout": OWN},
    "sharp": {"sharpness": 40.0, "head_dim": 64, "layout": OWN},
    "sharp-sinks": {"sharpness": 40.0, "sinks": True},
    "flat": {"sharpness": 0.0, "page_size": 32},
    "equal": {"lengths": EQUAL, "table": "contiguous", "layout": OWN},
    "equal-scattered": {"lengths": EQUAL, "table": "permuted", "layout": OWN, "sinks": True},
    "equal-interleaved": {"lengths": EQUAL, "table": "contiguous", "layout": "interleaved", "n_heads": 8},
    "all-equal": {"lengths": (333,) * 5, "table": "contiguous", "layout": OWN, "head_dim": 64},
    "all-equal-sinks": {"lengths": (64,) * 9, "table": "permuted", "sinks": True, "n_kv": 1},
    "long": {"lengths": LONG, "table": "halves", "head_dim": 64, "layout": "interleaved"},
    "long-sinks": {"lengths": LONG, "layout": OWN, "page_size": 32, "sinks": True, "n_heads": 8},
}


def make_case(case: str, **more: Any) -> Paged:
    return make_paged(**{"lengths": LENGTHS, **CASES[case], **more})


def reference(batch: Paged) -> tuple[Tensor, list[list[Tensor]], Tensor]:
    """The oracle's output [rows, n_heads, d], logits [row][head] of visible tokens, lse [rows, n_heads]."""
    rows, n_heads, _ = batch.q.shape
    groups = batch.seq_lens.shape[1]
    per_group = n_heads // groups
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    lse = torch.full((rows, n_heads), -math.inf, dtype=torch.float64)
    logits: list[list[Tensor]] = [[torch.empty(0)] * n_heads for _ in range(rows)]
    for row in range(rows):
        for group in range(groups):
            heads = slice(group * per_group, (group + 1) * per_group)
            k, v = batch.keys[row][group], batch.values[row][group]
            sinks = None if batch.sinks is None else batch.sinks[heads]
            visible = torch.ones(len(k), dtype=torch.bool)
            out[row, heads] = attention(batch.q[row, heads], k, v, visible, batch.scale, sinks)[0]
            for head in range(heads.start, heads.stop):
                kv = (head - heads.start) // (per_group // k.shape[1])
                logits[row][head] = k[:, kv].double() @ batch.q[row, head].double() * batch.scale
                terms = logits[row][head]
                if batch.sinks is not None:
                    terms = torch.cat([terms, batch.sinks[head].double().reshape(1)])
                lse[row, head] = torch.logsumexp(terms, 0) if len(terms) else -math.inf
    return out, logits, lse


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


GROUPED = [
    [0, 40],
    [16, 17],
    [33, 1],
    [64, 64],
    [300, 290],
    [1, 0],
    [129, 257],
]


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


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


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


def with_two_threads(op: Op) -> Op:
    """The op with two threads, and the test around it as before."""

    def threaded(*arguments: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return op(*arguments)
        finally:
            torch.set_num_threads(before)

    return threaded


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
