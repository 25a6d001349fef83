"""A chunk's attention at a decode step and its merge with what there was, in one kernel on a GPU, in Triton.

While K and V cross the bus, or are made from X, the GPU has other things to do than to move them about: here they are
read once, where and as they lie, and nothing but the result is written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Bytes of K and V that a tile may have, of which two are under way.
_TILE_BYTES = 1 << 15


# These differ from piece to piece: a kernel for each kind of number would be compiled in the middle of a step.
@triton.jit(do_not_specialize=["start", "tokens"])
def _accumulate(
    q,
    k,
    v,
    out,
    lse,
    lengths,
    scale,
    start,
    tokens,
    q_row,
    q_head,
    k_token,
    k_row,
    k_head,
    v_token,
    v_row,
    v_head,
    out_row,
    out_head,
    lse_row,
    lse_head,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """All tokens of one row for one KV head. Grid: (KV heads, rows)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    kv_head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    last = tokens
    if RAGGED:
        last = tl.minimum(tokens, tl.load(lengths + row).to(tl.int32) - start)
    if last > 0:
        h, d, t = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, TILE).to(tl.int64)
        head = kv_head * GROUP + h
        is_head, in_dim = h < GROUP, d < DIM
        both = is_head[:, None] & in_dim[None, :]
        queries = tl.load(q + row * q_row + head[:, None] * q_head + d[None, :], mask=both, other=0.0)
        out_at = out + row * out_row + head[:, None] * out_head + d[None, :]
        lse_at = lse + row * lse_row + head * lse_head
        # What there was counts as one token with the logit `lse`. A query that has seen nothing yet has -inf there.
        top = tl.load(lse_at, mask=is_head, other=float("-inf"))
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        result = tl.load(out_at, mask=both, other=0.0)
        k += row * k_row + kv_head * k_head
        v += row * v_row + kv_head * v_head
        for first in tl.range(0, last, TILE, num_stages=2):
            visible = first + t < last
            shown = visible[:, None] & in_dim[None, :]
            keys = tl.load(k + (first + t)[:, None] * k_token + d[None, :], mask=shown, other=0.0)
            values = tl.load(v + (first + t)[:, None] * v_token + d[None, :], mask=shown, other=0.0)
            s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            s = tl.where(visible[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            weights = tl.exp2(s * LOG2E - (new_top * LOG2E)[:, None])
            fade = tl.exp2((top - new_top) * LOG2E)
            total = total * fade + tl.sum(weights, 1)
            result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            top = new_top
        tl.store(out_at, result / total[:, None], mask=both)
        tl.store(lse_at, top + tl.log(total), mask=is_head)


def accumulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    start: int = 0,
    lengths: Tensor | None = None,
) -> None:
    """See `naive.accumulate`; one query token a row, and the last dimension of each tensor has its elements side by
    side."""
    rows, n_heads, width, dim = q.shape
    tokens, _, n_kv, _ = k.shape
    assert width == 1 and q.stride(3) == k.stride(3) == v.stride(3) == out.stride(3) == 1
    block_d = max(16, triton.next_power_of_2(dim))
    tile = max(16, min(128, _TILE_BYTES // (2 * block_d * k.element_size())))
    _accumulate[(n_kv, rows)](
        q, k, v, out, lse, lse if lengths is None else lengths, scale, start, tokens,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], *out.stride()[:2], *lse.stride()[:2],
        GROUP=n_heads // n_kv, BLOCK_H=max(16, triton.next_power_of_2(n_heads // n_kv)), DIM=dim, BLOCK_D=block_d,
        TILE=tile, RAGGED=lengths is not None, num_warps=4,
    )  # fmt: skip
