"""Full attention of several new tokens a row, in plain PyTorch: the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.chunk_attention import naive


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
    """Causal attention of each row's new tokens over all of its tokens; the new K and V are in the pool already.

    q: [rows, n_heads, width, head_dim]; k, v: [rows, n_kv_heads, width, head_dim], the new tokens' own.
    k_cache, v_cache: [n_pages, page_size, n_kv_heads, head_dim]; block_table: int32 [rows, 1, pages].
    past_lens: int32 [rows], tokens before these. real: bool [rows, width], the columns that are tokens and not
    padding; they stand together. Table, past_lens and real are on the CPU, where looking at them waits for nothing.
    sinks: [n_heads] or None.
    Returns [rows, width, n_heads, head_dim] in q's dtype, zeros for padding.
    """
    out = torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    for row, past in enumerate(past_lens.tolist()):
        columns = real[row].nonzero().flatten()
        if len(columns) == 0:
            continue
        tokens = past + len(columns)
        pages = block_table[row, 0, : -(-tokens // k_cache.shape[1])].long()
        row_k, row_v = k_cache[pages].flatten(0, 1)[:tokens], v_cache[pages].flatten(0, 1)[:tokens]
        out[row, columns] = naive.chunk_attention(q[row].transpose(0, 1)[columns], row_k, row_v, scale, sinks)
    return out
