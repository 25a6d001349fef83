"""Paged attention on the CPU: PyTorch's own flash kernel over views of the pool, a row at a time.

Three facts shape it. The kernel works on [heads, queries, dim], so the query heads of one KV head go in as its
queries: K and V are read once, not once a query head. A row whose pages lie side by side in the pool (the pool
places them so) is one strided view, read in place; scattered pages are first gathered into a buffer that is kept,
because the page faults of a fresh one cost four times the copy. Long rows are cut into chunks of a fixed length,
merged by log-sum-exp, so that all cores have work; the cut depends on the row's length alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

#: Tokens a chunk. Shorter ones cost more merging than they balance.
CHUNK = 1024

#: Up to this many runs of neighbouring pages are read in place; a row in more pieces is gathered.
MAX_RUNS = 4

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_local = threading.local()


def _scratch(name: str, like: Tensor, pages: int) -> Tensor:
    """A kept buffer for `pages` pages shaped and typed like those of `like`; contents undefined."""
    buffers: dict[tuple[object, ...], Tensor] = _local.__dict__.setdefault("buffers", {})
    key = (name, like.dtype, tuple(like.shape[1:]))
    buffer = buffers.get(key)
    if buffer is None or buffer.shape[0] < pages:
        buffer = buffers[key] = torch.empty((pages, *like.shape[1:]), dtype=like.dtype)
    return buffer[:pages]


def _segments(k_cache: Tensor, v_cache: Tensor, pages: np.ndarray, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The row's K and V, [tokens, n_kv, dim] each, in order, in as few pieces as its pages allow."""
    page_size = k_cache.shape[1]
    edges = np.flatnonzero(np.diff(pages) != 1) + 1
    if len(edges) < MAX_RUNS:
        left = seq_len
        for run in np.split(pages, edges):
            first, count = int(run[0]), len(run)
            tokens = min(left, count * page_size)
            left -= tokens
            yield (
                k_cache[first : first + count].flatten(0, 1)[:tokens],
                v_cache[first : first + count].flatten(0, 1)[:tokens],
            )
        return
    index = torch.from_numpy(pages)
    k = torch.index_select(k_cache, 0, index, out=_scratch("k", k_cache, len(pages)))
    v = torch.index_select(v_cache, 0, index, out=_scratch("v", v_cache, len(pages)))
    yield k.flatten(0, 1)[:seq_len], v.flatten(0, 1)[:seq_len]


def _attend(q: Tensor, segments: Iterator[tuple[Tensor, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """q [n_kv, heads a KV head, dim] over the segments: out of the same shape, lse fp32 [n_kv, heads a KV head]."""
    outs, lses = [], []
    for k, v in segments:
        tokens, n_kv, dim = k.shape
        whole = tokens // CHUNK if tokens > CHUNK else 0
        if whole:
            cut = (whole, CHUNK, n_kv, dim)
            out, lse = _flash(
                q.expand(whole, -1, -1, -1),
                k[: whole * CHUNK].view(cut).transpose(1, 2),
                v[: whole * CHUNK].view(cut).transpose(1, 2),
                scale=scale,
            )
            outs.append(out)
            lses.append(lse)
        if whole * CHUNK < tokens:
            rest_k, rest_v = (
                k[None, whole * CHUNK :].transpose(1, 2),
                v[None, whole * CHUNK :].transpose(1, 2),
            )
            out, lse = _flash(q[None], rest_k, rest_v, scale=scale)
            outs.append(out)
            lses.append(lse)
    if len(outs) == 1 and outs[0].shape[0] == 1:
        return outs[0][0], lses[0][0]
    parts = torch.cat(lses)  # [chunks, n_kv, heads a KV head]
    total = torch.logsumexp(parts, dim=0)
    weights = torch.exp(parts - total)
    return (torch.cat(outs).float() * weights[..., None]).sum(0), total


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
    rows, n_heads, dim = q.shape
    page_size, n_kv = k_cache.shape[1:3]
    groups = block_table.shape[1]
    kv_heads = n_kv // groups
    grouped = q.reshape(rows, groups, kv_heads, n_heads // n_kv, dim)
    sinks = None if sinks is None else sinks.float().view(groups, kv_heads, n_heads // n_kv)
    out = torch.zeros_like(grouped, memory_format=torch.contiguous_format)
    tables, lengths = block_table.numpy(), seq_lens.tolist()
    for row in range(rows):
        for g in range(groups):
            seq_len = lengths[row][g]
            if seq_len == 0:
                continue
            pages = tables[row, g, : -(-seq_len // page_size)]
            k, v = k_cache, v_cache
            if groups > 1:
                k = k[:, :, g * kv_heads : (g + 1) * kv_heads]
                v = v[:, :, g * kv_heads : (g + 1) * kv_heads]
            attended, lse = _attend(grouped[row, g], _segments(k, v, pages, seq_len), scale)
            if sinks is not None:
                attended = attended * torch.sigmoid(lse - sinks[g])[..., None]
            out[row, g] = attended
    return out.view(rows, n_heads, dim)


def decode_attention_stats(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `naive.decode_attention_stats`. K is read once for the logits and V once for the output."""
    rows, n_heads, dim = q.shape
    page_size, n_kv = k_cache.shape[1:3]
    groups, width = block_table.shape[1:]
    kv_heads, shared = n_kv // groups, n_heads // n_kv
    grouped = q.reshape(rows, groups, kv_heads, shared, dim).float()
    out = torch.zeros((rows, groups, kv_heads, shared, dim), dtype=q.dtype)
    logits = torch.full((rows, groups, kv_heads, shared, width * page_size), float("-inf"))
    lse = torch.full((rows, groups, kv_heads, shared), float("-inf"))
    if sinks is not None:
        sinks = sinks.float().view(groups, kv_heads, shared)
        lse.copy_(sinks.expand_as(lse))
    tables, lengths = block_table.numpy(), seq_lens.tolist()
    for row in range(rows):
        for g in range(groups):
            seq_len = lengths[row][g]
            if seq_len == 0:
                continue
            pages = tables[row, g, : -(-seq_len // page_size)]
            heads = slice(g * kv_heads, (g + 1) * kv_heads)
            segments = list(_segments(k_cache[:, :, heads], v_cache[:, :, heads], pages, seq_len))
            # The weights live in a tensor of their own, so that a row's arithmetic never sees its neighbours' width.
            weights = torch.cat([torch.bmm(grouped[row, g], k.float().permute(1, 2, 0)) for k, _ in segments], dim=-1)
            weights *= scale
            logits[row, g, ..., :seq_len] = weights
            top = weights.amax(-1, keepdim=True)
            if sinks is not None:
                top = torch.maximum(top, sinks[g, ..., None])
            weights = weights.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            if sinks is not None:
                total += torch.exp(sinks[g, ..., None] - top)
            parts = torch.split(weights, [k.shape[0] for k, _ in segments], dim=-1)
            attended = sum(
                torch.bmm(part, v.float().transpose(0, 1)) for part, (_, v) in zip(parts, segments, strict=True)
            )
            out[row, g] = attended / total
            lse[row, g] = (top + total.log()).squeeze(-1)
    return out.view(rows, n_heads, dim), logits.view(rows, n_heads, -1), lse.view(rows, n_heads)
