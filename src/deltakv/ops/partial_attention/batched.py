"""Attention over a part of the tokens, in two batched products, in the tokens' own dtype with sums in fp32."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from deltakv.ops.partial_attention import naive


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `naive.partial_attention`."""
    rows, n_heads, width, dim = q.shape
    tokens, _, n_kv, _ = k.shape
    group = n_heads // n_kv
    # The queries of one KV head are the rows of one product: its K is read once.
    queries = q.reshape(rows * n_kv, group * width, dim)
    keys, values = (x.permute(1, 2, 0, 3).reshape(rows * n_kv, tokens, dim) for x in (k, v))
    logits = _product(queries, keys.transpose(1, 2)).mul_(scale)
    if visible is not None:
        shaped = logits.view(rows, n_heads, width, tokens)
        shaped.masked_fill_(~visible, float("-inf"))
        unseen = ~visible.expand(rows, n_heads, width, tokens)[:, ::group].any(2)  # heads of a KV head see alike
        values = values.masked_fill(unseen.reshape(rows * n_kv, tokens, 1), 0.0)
    peaks = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = logits.sub_(peaks).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (peaks + total.log()).view(rows, n_heads, width)
    # Weights are at most 1 here, where a 16-bit dtype is precise; their sum is divided by afterwards, in fp32.
    out = _product(weights.to(v.dtype), values).div_(total.clamp_min(torch.finfo(torch.float32).tiny))
    return out.view(rows, n_heads, width, dim), lse


def _product(a: Tensor, b: Tensor) -> Tensor:
    """fp32 products of matrices in 16 or 32 bits."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())  # CPUs have no such product


#: See `naive.accumulate`.
accumulate = partial(naive.accumulate, attention=partial_attention)
