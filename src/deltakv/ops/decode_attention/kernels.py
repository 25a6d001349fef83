"""The kernels of `triton.py`: a chunk of a row for the query heads of one KV head, and a row's chunks merged.

Bytes are all that counts: K and V are read once, by tiles that tensor cores multiply while the next ones are on
their way.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
