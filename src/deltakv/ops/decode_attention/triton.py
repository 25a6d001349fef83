"""Paged decode attention on a GPU, in Triton: split over a row's tokens, the query heads of one KV head together.

Bytes are all that counts: K and V are read once, by tiles that tensor cores multiply while the next ones are on
their way. A row is cut into chunks counted from its first token, as many as its table has room for, so that neither
the batch nor a look at the lengths decides anything: chunks beyond a row's end return at once, and a row's bits
depend on that row and its table's width alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _chunk(
    first,
    last,
    queries,
    k,
    v,
    table,
    top,
    total,
    result,
    logits,
    peaks,
    stored,
    head,
    is_head,
    in_dim,
    k_page,
    k_token,
    v_page,
    v_token,
    width,
    scale,
    N_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    STATS: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The tokens first .. last of a row, at most CHUNK, added to what `top`, `total` and `result` hold of those before.

    k, v: of the KV head. table: the row's. stored: where the statistics of the row's first tile go. STAGES: tiles
    under way at once.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    d, t = tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    # The chunk's part of the table, at once: looked up in the loop, it would hold back what is loaded ahead.
    entry = first // PAGE + tl.arange(0, CHUNK // PAGE)
    pages = tl.load(table + entry, mask=entry < width, other=0)
    if WIDE:
        wide = tl.full([], 0, tl.int64)
        pages, k_token, v_token = pages + wide, k_token + wide, v_token + wide
    k_within = (t % PAGE)[:, None] * k_token + d[None, :]
    v_within = (t % PAGE)[:, None] * v_token + d[None, :]
    for start in tl.range(0, last - first, TILE, num_stages=STAGES):
        visible = start + t < last - first
        shown = visible[:, None] & in_dim[None, :]
        # What is loaded ahead may begin beyond the chunk; it is masked, but its place must be one in the chunk.
        page = tl.gather(pages, (start // PAGE + t // PAGE) % (CHUNK // PAGE), 0)[:, None]
        slot = start % PAGE if PAGE > TILE else 0  # of the tile's first token
        k_at = page * k_page + k_within + slot * k_token
        v_at = k_at if ALIKE else page * v_page + v_within + slot * v_token
        keys = tl.load(k + k_at, mask=shown, other=0.0)
        values = tl.load(v + v_at, mask=shown, other=0.0)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s = tl.where(visible[None, :], s, float("-inf"))
        peak = tl.max(s, 1)
        if STATS:
            where = stored + (first + start) // TILE * N_HEADS + head
            tl.store(peaks + where, peak, mask=is_head)
            tl.store(
                logits + where[:, None] * TILE + t[None, :],
                (s - peak[:, None]).to(logits.dtype.element_ty),
                mask=is_head[:, None],
            )
        new_top = tl.maximum(top, peak)
        weights = tl.exp2(s * LOG2E - (new_top * LOG2E)[:, None])
        fade = tl.exp2((top - new_top) * LOG2E)
        total = total * fade[:, None] + weights
        result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = new_top
    return top, total, result


@triton.jit
def _attend(
    q,
    k,
    v,
    table,
    lens,
    sinks,
    out,
    partial_out,
    partial_lse,
    logits,
    peaks,
    lse,
    q_row,
    k_page,
    k_token,
    k_head,
    v_page,
    v_token,
    v_head,
    width,
    tiles,
    scale,
    N_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    STATS: tl.constexpr,
    SINKS: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDE: tl.constexpr,
    LONG: tl.constexpr,
):
    """One chunk of one KV head of one row. Grid: (SPLITS, KV_HEADS, rows).

    ALIKE: K and V have the same strides. WIDE: offsets into them may need 64 bits. LONG: rows may have more tokens
    than the chunks; the last one goes on to the row's end.
    """
    split, kv_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    SHARED: tl.constexpr = N_HEADS // KV_HEADS
    group = kv_head // (KV_HEADS // GROUPS)
    length = tl.load(lens + row * GROUPS + group)
    first = split * CHUNK
    last = tl.minimum(first + CHUNK, length)
    if SPLITS > 1:  # noqa: SIM102 (where it is known not to return, nothing waits for the length)
        if first >= length and split > 0:
            return
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    head = kv_head * SHARED + h
    is_head, in_dim = h < SHARED, d < DIM
    queries = tl.load(
        q + row * q_row + head[:, None] * DIM + d[None, :], mask=is_head[:, None] & in_dim[None, :], other=0.0
    )
    k += kv_head * k_head
    v += kv_head * v_head
    table += (row * GROUPS + group) * width
    stored = row * tiles * N_HEADS
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H, TILE], tl.float32)  # summed over the tile once, at the end
    result = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    top, total, result = _chunk(
        first, last, queries, k, v, table, top, total, result, logits, peaks, stored, head, is_head, in_dim,
        k_page, k_token, v_page, v_token, width, scale, N_HEADS, BLOCK_D, PAGE, CHUNK, TILE, STATS, ALIKE, WIDE, 3,
    )  # fmt: skip
    if LONG:  # noqa: SIM102
        if split == SPLITS - 1:
            for begin in range(first + CHUNK, length, CHUNK):
                top, total, result = _chunk(
                    begin, tl.minimum(begin + CHUNK, length), queries, k, v, table, top, total, result, logits, peaks,
                    stored, head, is_head, in_dim, k_page, k_token, v_page, v_token, width, scale, N_HEADS, BLOCK_D,
                    PAGE, CHUNK, TILE, STATS, ALIKE, WIDE, 1,  # the exception: not at the cost of registers
                )  # fmt: skip
    total = tl.sum(total, 1)
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=is_head, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, sink)
            fade = tl.exp(top - new_top)
            total = total * fade + tl.exp(sink - new_top)
            result = result * fade[:, None]
            top = new_top
        if STATS:
            tl.store(lse + row * N_HEADS + head, top + tl.log(total), mask=is_head)
        result = tl.where(length > 0, result / total[:, None], 0.0)
        tl.store(
            out + (row * N_HEADS + head)[:, None] * DIM + d[None, :],
            result.to(out.dtype.element_ty),
            mask=is_head[:, None] & in_dim[None, :],
        )
    else:
        part = (row * N_HEADS + head) * SPLITS + split
        tl.store(partial_lse + part, top + tl.log(total), mask=is_head)
        tl.store(
            partial_out + part[:, None] * DIM + d[None, :],
            result / total[:, None],
            mask=is_head[:, None] & in_dim[None, :],
        )


@triton.jit
def _merge(
    partial_out,
    partial_lse,
    lens,
    sinks,
    out,
    lse,
    N_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STATS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The chunks of one head of one row by their log-sum-exp. Grid: (N_HEADS, rows)."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_dim = d < DIM
    length = tl.load(lens + row * GROUPS + head // (N_HEADS // GROUPS))
    used = tl.minimum((length + CHUNK - 1) // CHUNK, SPLITS)
    part = (row * N_HEADS + head) * SPLITS
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINKS:
        top = tl.load(sinks + head).to(tl.float32)
        total += 1.0
    result = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, used, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        logs = tl.load(partial_lse + part + split, mask=split < used, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(logs, 0))
        fade, weights = tl.exp(top - new_top), tl.exp(logs - new_top)
        rows = tl.load(
            partial_out + (part + split)[:, None] * DIM + d[None, :],
            mask=(split < used)[:, None] & in_dim[None, :],
            other=0.0,
        )
        result = result * fade + tl.sum(rows * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        top = new_top
    if STATS:
        tl.store(lse + row * N_HEADS + head, top + tl.log(total))
    result = tl.where(length > 0, result / total, 0.0)
    tl.store(out + (row * N_HEADS + head) * DIM + d, result.to(out.dtype.element_ty), mask=in_dim)


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
