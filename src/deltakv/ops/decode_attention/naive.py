"""Paged attention of one query token a row, in plain PyTorch: the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each row's query over the tokens that its block table lists.

    q: [rows, n_heads, head_dim].
    k_cache, v_cache: [n_pages, page_size, n_kv_heads, head_dim], any strides; the query heads of one KV head are
        neighbours (grouped-query attention).
    block_table: int32 [rows, groups, width], the physical page of each logical page. `groups` divides n_kv_heads;
        group g serves the g-th part of the KV heads. One group means one table for all heads.
    seq_lens: int32 [rows, groups], the tokens that are visible, counted along the table; only the last page may be
        partly filled. A row with 0 gets zeros.
    sinks: [n_heads] logits that a model learns (gpt-oss); they stay in the softmax's denominator.
    Returns [rows, n_heads, head_dim] in q's dtype.
    """
    return decode_attention_stats(q, k_cache, v_cache, block_table, seq_lens, scale, sinks)[0]


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
    """`decode_attention`, its result written to `out`, contiguous, where an engine wants it.

    expected: tokens that rows have at most, but for exceptions, which may take longer; 0: any that the table has room
    for.
    """
    out.copy_(decode_attention(q, k_cache, v_cache, block_table, seq_lens, scale, sinks))


def decode_attention_stats(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decode_attention`, and what scoring needs of its softmax: the scaled logits, tile by tile of a row's tokens.

    Returns out as above; logits, floating, [rows, tiles, n_heads, tile], less their tile's peak; peaks, fp32 [rows,
    tiles, n_heads]; lse, fp32 [rows, n_heads], the log-sum-exp of the logits themselves with the sinks included
    (-inf for a row without tokens or sinks). A version may choose its tiles, as long as they cover width * page_size
    tokens; fp16 logits are precise where it counts if each tile has its own peak. What stands beyond a row's end in
    logits and peaks means nothing. Here: one tile of width * page_size, with 0 as its peak.
    """
    rows, n_heads, _ = q.shape
    _, page_size, n_kv, dim = k_cache.shape
    groups, width = block_table.shape[1:]
    heads_a_group = n_kv // groups

    position = torch.arange(width * page_size, device=q.device)
    visible = position < seq_lens[..., None]  # [rows, groups, tokens]
    page_visible = visible.view(rows, groups, width, page_size)[..., 0]
    pages = torch.where(page_visible, block_table, 0).long()

    def gather(cache: Tensor) -> Tensor:
        """[rows, n_kv, tokens, dim] in fp32, zeros where nothing is visible (unused slots may hold anything)."""
        parts = []
        for g in range(groups):
            heads = cache[:, :, g * heads_a_group : (g + 1) * heads_a_group]
            tokens = heads[pages[:, g]].flatten(1, 2).float()  # [rows, tokens, heads, dim]
            parts.append(tokens.masked_fill(~visible[:, g, :, None, None], 0.0))
        return torch.cat(parts, dim=2).transpose(1, 2)

    k, v = gather(k_cache), gather(v_cache)
    grouped = q.float().view(rows, n_kv, n_heads // n_kv, dim)
    logits = grouped @ k.transpose(-1, -2) * scale  # [rows, n_kv, heads a KV head, tokens]
    hidden = ~visible.repeat_interleave(heads_a_group, dim=1)[:, :, None]
    logits = logits.masked_fill(hidden, float("-inf")).view(rows, n_heads, width * page_size)
    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float())
    probabilities = torch.exp(logits - lse[..., None].clamp_min(torch.finfo(torch.float32).min))
    out = probabilities.view(rows, n_kv, n_heads // n_kv, width * page_size) @ v
    return out.view(rows, n_heads, dim).to(q.dtype), logits[:, None], torch.zeros_like(lse)[:, None], lse
