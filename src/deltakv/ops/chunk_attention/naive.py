"""Many query positions on one row's K and V, in plain PyTorch: the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_tokens(m: int, tokens: int, kept: Tensor | None, page_size: int, device: torch.device) -> Tensor:
    """bool [m, tokens]: what each of the last `m` of `tokens` positions may see, itself included.

    kept: bool [m, n_pages], the pages a position may see at all; None for all pages.
    """
    position = torch.arange(tokens - m, tokens, device=device)[:, None]
    token = torch.arange(tokens, device=device)
    visible = token <= position
    return visible if kept is None else visible & kept[:, token // page_size]


def chunk_logits(
    q: Tensor, k: Tensor, scale: float, sinks: Tensor | None = None, page_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Causal attention logits of the last m of T positions, laid out as `decode_attention_stats` does.

    q: [m, n_heads, head_dim]; k: [T, n_kv_heads, head_dim]; sinks: [n_heads] or None.
    Returns logits, fp32 [m, n_heads, n_pages * page_size], scaled, -inf where invisible; lse, fp32 [m, n_heads].
    """
    m, n_heads, dim = q.shape
    tokens, n_kv, _ = k.shape
    padded = -(-tokens // page_size) * page_size
    grouped = q.float().view(m, n_kv, n_heads // n_kv, dim)
    logits = torch.full((m, n_heads, padded), float("-inf"), device=q.device)
    products = torch.einsum("mngd,tnd->mngt", grouped, k.float()).reshape(m, n_heads, tokens) * scale
    hidden = ~visible_tokens(m, tokens, None, page_size, q.device)
    logits[..., :tokens] = products.masked_fill(hidden[:, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    return logits, lse if sinks is None else torch.logaddexp(lse, sinks.float())


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    page_size: int = 16,
) -> Tensor:
    """Causal attention of the last m of T positions of one row, each over the pages it keeps.

    q: [m, n_heads, head_dim]; k, v: [T, n_kv_heads, head_dim]; sinks: [n_heads] or None.
    kept: bool [m, n_pages], pages counted from the row's first token; None keeps all. A position's own page is kept.
    Returns [m, n_heads, head_dim] in q's dtype.
    """
    m, n_heads, dim = q.shape
    tokens, n_kv, _ = k.shape
    logits, _ = chunk_logits(q, k, scale, None, page_size)
    visible = visible_tokens(m, tokens, kept, page_size, q.device)
    logits = logits[..., :tokens].masked_fill(~visible[:, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float())
    probabilities = torch.exp(logits - lse[..., None]).view(m, n_kv, n_heads // n_kv, tokens)
    return torch.einsum("mngt,tnd->mngd", probabilities, v.float()).reshape(m, n_heads, dim).to(q.dtype)
