"""prefill_attention and row_kv against the dense reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from paged_inputs import Paged, make_paged
from torch import Tensor

import oracle
from deltakv import ops
from deltakv.ops.prefill_attention.naive import prefill_attention as naive_prefill

Op = Callable[..., Any]
OPS = [pytest.param(ops.prefill_attention, id="registered"), pytest.param(naive_prefill, id="naive")]

#: (past, new, padding on the left, padding on the right) of each row of a batch.
Row = tuple[int, int, int, int]
BATCHES: dict[str, list[Row]] = {
    "prompt": [(0, 33, 0, 0), (0, 33, 0, 0)],
    "left-padded": [(0, 33, 0, 0), (0, 1, 32, 0), (0, 16, 17, 0), (0, 0, 33, 0)],
    "right-padded": [(0, 20, 0, 0), (0, 3, 5, 12)],
    "second-turn": [(100, 20, 0, 0), (15, 17, 3, 0), (16, 20, 0, 0), (1, 2, 18, 0)],
    "mixed": [(0, 40, 0, 0), (200, 7, 33, 0), (31, 33, 7, 0), (64, 0, 40, 0)],
    "one-row": [(47, 5, 0, 0)],
}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"n_kv": 4, "head_dim": 64, "table": "contiguous"},
    "sinks": {"sinks": True, "layout": "interleaved"},
    "page-32": {"page_size": 32, "layout": "heads_first", "n_heads": 6, "n_kv": 1},
    "own": {"n_heads": 6, "n_kv": 3, "layout": "heads_outermost"},
    "views": {"views": True, "sinks": True},
}


def make_prefill(rows: Sequence[Row], *, views: bool = False, **options: Any) -> tuple[Paged, tuple[Any, ...], Tensor]:
    """The pool with past and new tokens in it, the op's arguments, and the reference's output."""
    pool = make_paged([past + new for past, new, _, _ in rows], **options)
    width = sum(rows[0][1:])
    n_kv, head_dim = pool.k_cache.shape[2:]
    n_heads, dtype = pool.q.shape[1], pool.q.dtype
    generator = torch.Generator().manual_seed(1)
    q = (torch.randn(len(rows), width, n_heads, head_dim, generator=generator) * 2).to(dtype)
    k, v = torch.full((2, len(rows), width, n_kv, head_dim), 1e4, dtype=dtype)  # padding's K and V: far off
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    want = torch.zeros(q.shape, dtype=torch.float64)
    for row, (past, new, left, right) in enumerate(rows):
        assert left + new + right == width
        real[row, left : left + new] = True
        keys, values = pool.keys[row][0], pool.values[row][0]
        k[row, left : left + new], v[row, left : left + new] = keys[past:], values[past:]
        for i in range(new):
            visible = torch.arange(past + new) <= past + i
            column = left + i
            want[row, column] = oracle.attention(q[row, column], keys, values, visible, pool.scale, pool.sinks)[0]
    heads_first = [x.transpose(1, 2) if views else x.transpose(1, 2).contiguous() for x in (q, k, v)]
    past_lens = torch.tensor([row[0] for row in rows], dtype=torch.int32)
    table = pool.block_table
    return pool, (*heads_first, pool.k_cache, pool.v_cache, table, past_lens, real, pool.scale, pool.sinks), want


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", BATCHES)
def test_output_equals_dense_reference(op: Op, case: str, rows: str) -> None:
    _, arguments, want = make_prefill(BATCHES[rows], **CASES[case])
    out = op(*arguments)
    assert out.shape == want.shape and out.dtype == torch.float32
    real = arguments[7]
    torch.testing.assert_close(out[real].double(), want[real], rtol=0, atol=1e-5)
    assert (out[~real] == 0).all(), "zeros for padding"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", BATCHES)
def test_bfloat16(op: Op, rows: str) -> None:
    """Error no more than 1.5 times that of torch's own bf16 attention over the same tokens, row by row."""
    pool, arguments, want = make_prefill(BATCHES[rows], dtype=torch.bfloat16, head_dim=64)
    out, q = op(*arguments), arguments[0]
    assert out.dtype == torch.bfloat16
    ours, theirs = [], []
    for row, (past, new, left, _) in enumerate(BATCHES[rows]):
        if new:
            columns = slice(left, left + new)
            visible = torch.arange(past + new)[None] <= torch.arange(past, past + new)[:, None]
            k, v = (x[row][0].transpose(0, 1)[None] for x in (pool.keys, pool.values))
            stock = torch.nn.functional.scaled_dot_product_attention(
                q[row : row + 1, :, columns], k, v, attn_mask=visible, scale=pool.scale, enable_gqa=True
            )[0].transpose(0, 1)
            theirs.append((stock.double() - want[row, columns]).flatten())
            ours.append((out[row, columns].double() - want[row, columns]).flatten())
    our_error, their_error = torch.cat(ours), torch.cat(theirs)
    assert their_error.abs().max() < 0.02, "the yardstick itself must be sound"
    assert our_error.square().mean().sqrt() <= 1.5 * their_error.square().mean().sqrt() + 1e-5
    assert our_error.abs().max() <= 1.5 * their_error.abs().max() + 1e-3


@pytest.mark.parametrize("table", ["contiguous", "permuted", "halves"])
@pytest.mark.parametrize("layout", ["plain", "interleaved", "heads_first", "heads_outermost"])
def test_row_kv_gives_the_tokens_in_order(table: str, layout: str) -> None:
    batch = make_paged([1, 16, 17, 100, 300], table=table, layout=layout)
    for row, length in enumerate(batch.seq_lens[:, 0].tolist()):
        for tokens in {length, 1, (length + 1) // 2}:
            k, v = ops.row_kv(batch.k_cache, batch.v_cache, batch.block_table[row, 0], tokens)
            assert torch.equal(k, batch.keys[row][0][:tokens]) and torch.equal(v, batch.values[row][0][:tokens])


@pytest.mark.parametrize("rows", ["prompt", "mixed"])
@pytest.mark.parametrize("case", ["gqa", "views"])
def test_opcheck(rows: str, case: str) -> None:
    pool, arguments, want = make_prefill(BATCHES[rows], **CASES[case])
    pool.k_cache.nan_to_num_(0.0)
    pool.v_cache.nan_to_num_(0.0)
    torch.library.opcheck(torch.ops.deltakv.prefill_attention.default, arguments)
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    out = torch.ops.deltakv.prefill_attention(*meta)
    assert out.device.type == "meta" and out.shape == want.shape and out.dtype == torch.float32
