"""Full attention of several new tokens, a row at a time, or all rows at once where none has padding or a past."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.chunk_attention import causal_attention, chunk_attention


def row_kv(k_cache: Tensor, v_cache: Tensor, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of the first `tokens` tokens on `pages`, [tokens, n_kv_heads, head_dim]: a view where pages are
    neighbours, else a copy."""
    pages = pages[: -(-tokens // k_cache.shape[1])]
    first, last = int(pages[0]), int(pages[-1])
    if last - first + 1 == len(pages) and bool((pages.diff() == 1).all()):
        return k_cache[first : last + 1].flatten(0, 1)[:tokens], v_cache[first : last + 1].flatten(0, 1)[:tokens]
    return k_cache[pages.long()].flatten(0, 1)[:tokens], v_cache[pages.long()].flatten(0, 1)[:tokens]


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    real: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `naive.prefill_attention`."""
    past = past_lens.tolist()
    if not any(past) and sinks is None and bool(real.all()):
        return causal_attention(q, k, v, scale).transpose(1, 2).contiguous()
    out = torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    counts, starts = real.sum(1).tolist(), real.byte().argmax(1).tolist()
    for row in range(len(q)):
        if not counts[row]:
            continue
        columns = slice(starts[row], starts[row] + counts[row])
        if past[row]:
            row_k, row_v = row_kv(k_cache, v_cache, block_table[row, 0], past[row] + counts[row])
        else:
            row_k, row_v = k[row, :, columns].transpose(0, 1), v[row, :, columns].transpose(0, 1)
        out[row, columns] = chunk_attention(q[row, :, columns].transpose(0, 1), row_k, row_v, scale, sinks)
    return out
