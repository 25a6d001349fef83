"""Many query positions on one row's K and V, in blocks of queries so that masks and logits stay small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltakv.ops.chunk_attention.naive import visible_tokens

#: Queries a block with a mask: at 32k tokens the mask is 8 MB of bool.
BLOCK = 256


def chunk_logits(
    q: Tensor, k: Tensor, scale: float, sinks: Tensor | None = None, page_size: int = 16
) -> tuple[Tensor, Tensor]:
    """See `naive.chunk_logits`."""
    m, n_heads, dim = q.shape
    tokens, n_kv, _ = k.shape
    padded = -(-tokens // page_size) * page_size
    stacked = q.float().view(m, n_kv, -1, dim).transpose(0, 1).reshape(n_kv, -1, dim)
    products = torch.bmm(stacked, k.float().permute(1, 2, 0)).mul_(scale)  # [n_kv, m * heads a KV head, tokens]
    logits = torch.full((m, n_heads, padded), float("-inf"), device=q.device)
    logits[..., :tokens] = products.view(n_kv, m, -1, tokens).transpose(0, 1).reshape(m, n_heads, tokens)
    hidden = ~visible_tokens(m, tokens, None, page_size, q.device)
    logits[..., :tokens].masked_fill_(hidden[:, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    return logits, lse if sinks is None else torch.logaddexp(lse, sinks.float())


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Rows without a past: q [batch, n_heads, tokens, head_dim], k and v with their own heads; heads first, as `sdpa`.

    No fused kernel of a GPU takes fp32 with grouped heads, and the one that does keeps all logits; so there K and V are
    repeated.
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=grouped)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor, visible: Tensor) -> Tensor:
    """One block, with the sinks as a column of the softmax that has no value. Heads first, as `sdpa` has them."""
    n_heads, m, dim = q.shape
    n_kv, tokens, _ = k.shape
    logits = torch.bmm(q.float().view(n_kv, -1, dim), k.float().transpose(1, 2)).view(n_heads, m, tokens).mul_(scale)
    logits.masked_fill_(~visible, float("-inf"))
    column = sinks.float()[:, None, None].expand(n_heads, m, 1)
    probabilities = torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]
    return torch.bmm(probabilities.reshape(n_kv, -1, tokens), v.float()).view(n_heads, m, dim).to(q.dtype)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    page_size: int = 16,
) -> Tensor:
    """See `naive.chunk_attention`."""
    m, tokens = q.shape[0], k.shape[0]
    heads, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    grouped = heads.shape[0] != k.shape[0]
    if m == tokens and kept is None and sinks is None:
        return causal_attention(heads[None], k[None], v[None], scale)[0].transpose(0, 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start in range(0, m, BLOCK):
        stop = min(start + BLOCK, m)
        end = tokens - m + stop  # what the block's last position sees
        visible = visible_tokens(stop - start, end, None if kept is None else kept[start:stop], page_size, q.device)
        block, k_end, v_end = heads[:, start:stop], k[:, :end], v[:, :end]
        if sinks is not None:
            part = _with_sinks(block.contiguous(), k_end, v_end, scale, sinks, visible)
        else:
            part = F.scaled_dot_product_attention(
                block[None],
                k_end[None],
                v_end[None],
                attn_mask=visible[None, None],
                scale=scale,
                enable_gqa=grouped,
            )[0]
        out[start:stop] = part.transpose(0, 1)
    return out
