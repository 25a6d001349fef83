"""Attention over a part of the tokens, to be merged with that over other parts: the oracle of the op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each query over these tokens alone.

    q: [rows, n_heads, width, head_dim]; k, v: [tokens, rows, n_kv_heads, head_dim], any strides; the query heads of
    one KV head are neighbours.
    visible: bool, broadcast to [rows, n_heads, width, tokens], or None for all. What is invisible may hold anything,
    NaN too; a token that no query of its row sees has no influence.
    Returns out, fp32 [rows, n_heads, width, head_dim], and lse, fp32 [rows, n_heads, width], the log-sum-exp of the
    scaled logits; zeros and -inf for a query that sees nothing.
    """
    rows, n_heads, width, _dim = q.shape
    tokens, _, n_kv, _ = k.shape
    group = n_heads // n_kv
    keys, values = (x.permute(1, 2, 0, 3).float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("rhwd,rhtd->rhwt", q.float(), keys) * scale
    if visible is not None:
        visible = visible.expand(rows, n_heads, width, tokens)
        logits = logits.masked_fill(~visible, float("-inf"))
        values = values.masked_fill(~visible.any(2)[..., None], 0.0)
    lse = torch.logsumexp(logits, dim=-1)
    probabilities = torch.exp(logits - lse.clamp_min(torch.finfo(torch.float32).min)[..., None])
    return torch.einsum("rhwt,rhtd->rhwd", probabilities, values), lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts that share no token, from that over each: the log-sum-exp of both, and both outputs
    weighted by their share of it. Shapes as `partial_attention` returns them; -inf is a part that was not seen."""
    both = torch.logaddexp(lse, more_lse)
    safe = both.clamp_min(torch.finfo(torch.float32).min)
    return out * torch.exp(lse - safe)[..., None] + more * torch.exp(more_lse - safe)[..., None], both


def within(lengths: Tensor, start: int, count: int) -> Tensor:
    """Which of the tokens from `start` on each row has: bool [rows, 1, 1, count], as `partial_attention` takes it.

    lengths: int64 [rows], tokens of each row.
    """
    return (torch.arange(start, start + count, device=lengths.device) < lengths[:, None])[:, None, None]


def accumulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    start: int = 0,
    lengths: Tensor | None = None,
    *,
    attention: Callable[..., tuple[Tensor, Tensor]] = partial_attention,
) -> None:
    """`partial_attention`, merged in place with what `out` and `lse` hold already.

    start: the number of the first of these tokens in each row. lengths: int64 [rows], so many tokens a row are there to
    be seen; None for all. attention: which version of `partial_attention`.
    """
    visible = None if lengths is None else within(lengths, start, len(k))
    new_out, new_lse = merge(out, lse, *attention(q, k, v, scale, visible))
    out.copy_(new_out)
    lse.copy_(new_lse)
