"""Paged decode attention on a GPU, in Triton: split over a row's tokens, the query heads of one KV head together.

A row is cut into chunks counted from its first token, as many as its table has room for, so that neither the batch
nor a look at the lengths decides anything: chunks beyond a row's end return at once, and a row's bits depend on that
row and its table's width alone. Here that is decided and launched; what each chunk does is in `kernels.py`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from deltakv.ops.decode_attention.kernels import _attend, _merge

#: Bytes of K and V that a tile may have; two are under way in shared memory. Smaller ones read a large batch as fast,
#: but a single row has few programs, and each of its tiles takes a microsecond whatever its size.
_TILE_BYTES = 1 << 16
#: Numbers of a tile's logits, all query heads of a KV head together: they are held in registers.
_TILE_LOGITS = 1 << 12

#: Offsets up to here are computed in 32 bits, with half as many instructions.
_NARROW = (1 << 31) - 1


def block_heads(n_heads: int, n_kv: int) -> int:
    """The query heads of a KV head, filled up to what tensor cores multiply."""
    return max(16, triton.next_power_of_2(n_heads // n_kv))


def tile_tokens(q: Tensor, n_kv: int) -> int:
    """Tokens that are multiplied at once, for queries [rows, n_heads, head_dim]; their logits share a peak."""
    fitting = _TILE_BYTES // (2 * triton.next_power_of_2(q.shape[2]) * q.element_size())
    return max(32, min(128, fitting, _TILE_LOGITS // block_heads(q.shape[1], n_kv)))


def chunk_tokens(capacity: int) -> int:
    """Tokens of a chunk, for a table with room for `capacity` tokens.

    Short tables, what a REUSE layer reads, stay whole: merging chunks would take longer than reading them. Beyond, a
    single row is cut into enough chunks to fill the chip with, and into no more.
    """
    if capacity <= 2048:
        return 2048
    if capacity <= 16384:
        return 1024
    return 2048 if capacity <= 65536 else 4096


def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None,
    stats: bool,
    out: Tensor | None = None,
    expected: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, n_heads, dim = q.shape
    _, page_size, n_kv, _ = k_cache.shape
    groups, width = block_table.shape[1:]
    assert k_cache.stride(3) == v_cache.stride(3) == 1, "a token's numbers lie side by side"
    if q.stride()[1:] != (dim, 1):  # as when it is a part of what QKV gave, a row may lie anywhere
        q = q.contiguous()
    block_table, seq_lens = block_table.contiguous(), seq_lens.contiguous()
    capacity = width * page_size
    planned = min(capacity, expected) if expected else capacity
    chunk, tile = chunk_tokens(planned), tile_tokens(q, n_kv)
    splits, tiles = max(1, triton.cdiv(planned, chunk)), triton.cdiv(capacity, tile)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.is_contiguous()
    fp32 = {"dtype": torch.float32, "device": q.device}
    lse = torch.empty((rows, n_heads), **fp32)
    # fp16 even for bf16: relative to a peak that is at hand, its ten bits of fraction are what a logit needs.
    logits = torch.empty((rows, tiles if stats else 0, n_heads, tile), dtype=torch.float16, device=q.device)
    peaks = torch.empty((rows, tiles if stats else 0, n_heads), **fp32)
    parts = (rows, n_heads, splits) if splits > 1 else (0, 0, 0)
    partial_out, partial_lse = torch.empty((*parts, dim), **fp32), torch.empty(parts, **fp32)
    shape = {"N_HEADS": n_heads, "GROUPS": groups, "DIM": dim, "BLOCK_D": triton.next_power_of_2(dim)}
    furthest = max(
        sum(size * abs(step) for size, step in zip(pages.shape, pages.stride(), strict=True))
        for pages in (k_cache, v_cache)
    )
    shape |= {"CHUNK": chunk, "SPLITS": splits, "STATS": stats, "SINKS": sinks is not None}
    if rows == 0:
        return out, logits, peaks, lse
    _attend[(splits, n_kv, rows)](
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        sinks,
        out,
        partial_out,
        partial_lse,
        logits,
        peaks,
        lse,
        q.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        width,
        tiles,
        scale,
        **shape,
        KV_HEADS=n_kv,
        BLOCK_H=block_heads(n_heads, n_kv),
        PAGE=page_size,
        TILE=tile,
        ALIKE=k_cache.stride() == v_cache.stride(),
        WIDE=furthest > _NARROW,
        LONG=capacity > splits * chunk,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _merge[(n_heads, rows)](
            partial_out,
            partial_lse,
            seq_lens,
            sinks,
            out,
            lse,
            **shape,
            BLOCK_S=min(32, triton.next_power_of_2(splits)),
            num_warps=2,
        )
    return out, logits, peaks, lse


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `naive.decode_attention`."""
    return _run(q, k_cache, v_cache, block_table, seq_lens, scale, sinks, stats=False)[0]


def decode_attention_stats(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `naive.decode_attention_stats`. Logits leave in fp16, each tile's relative to its peak."""
    return _run(q, k_cache, v_cache, block_table, seq_lens, scale, sinks, stats=True)


def decode_attention_into(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None,
    out: Tensor,
    expected: int,
) -> None:
    """See `naive.decode_attention_into`. The grid is cut for rows of `expected` tokens; a longer one takes its time."""
    _run(q, k_cache, v_cache, block_table, seq_lens, scale, sinks, stats=False, out=out, expected=expected)
