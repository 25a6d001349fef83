"""What a page could be worth at most, from bounds on its K (Quest, arXiv 2406.10774, section 3.3): the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def bound_scores(q: Tensor, low: Tensor, high: Tensor, seq_lens: Tensor, scale: float, page_size: int) -> Tensor:
    """For each page the most that any query head could find there, next to the best that this head could find anywhere.

    A head's bound on a page's logits is the sum over channels of max(q * low, q * high), scaled. Bounds of different
    heads cannot be compared, so each is taken less the head's greatest bound, and the largest over heads counts.
    q: [rows, n_heads, head_dim]; low, high: [rows, width, n_kv_heads, head_dim], the least and greatest K of each page.
    seq_lens: int32 [rows]. The last page of a row, which may be partly filled, is not looked at, nor what lies beyond.
    Returns fp32 [rows, width], 0 or less; -inf for pages that were not looked at.
    """
    rows, n_heads, _ = q.shape
    width, n_kv = low.shape[1:3]
    scores = torch.full((rows, width), float("-inf"), device=q.device)
    for row in range(rows):
        pages = -(-int(seq_lens[row]) // page_size) - 1
        for head in range(n_heads if pages > 0 else 0):
            least, greatest = (x[row, :pages, head // (n_heads // n_kv)].float() for x in (low, high))
            query = q[row, head].float()
            bound = torch.maximum(query * least, query * greatest).sum(-1) * scale
            scores[row, :pages] = torch.maximum(scores[row, :pages], bound - bound.max())
    return scores
