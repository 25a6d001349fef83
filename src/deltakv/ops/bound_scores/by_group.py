"""Bounds of one query head of each KV head at a time, so that no temporary is larger than the bounds themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def bound_scores(q: Tensor, low: Tensor, high: Tensor, seq_lens: Tensor, scale: float, page_size: int) -> Tensor:
    """See `naive.bound_scores`."""
    rows, n_heads, dim = q.shape
    width, n_kv = low.shape[1:3]
    hidden = torch.arange(width, device=q.device) >= ((seq_lens + page_size - 1) // page_size - 1)[:, None]
    grouped = q.float().view(rows, 1, n_kv, n_heads // n_kv, dim)
    low, high = low.float(), high.float()
    scores = torch.full((rows, width), float("-inf"), device=q.device)
    for member in range(n_heads // n_kv):  # sums of products, not matrix products: their bits know no neighbours
        query = grouped[:, :, :, member]
        bound = (torch.maximum(query * low, query * high).sum(-1) * scale).masked_fill(hidden[..., None], float("-inf"))
        best = bound.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)  # -inf where no page is looked at
        scores = torch.maximum(scores, (bound - best).amax(-1))
    return scores
