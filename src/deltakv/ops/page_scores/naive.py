"""What a page is worth to a query (DELTA, arXiv 2510.09883, section 3): the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def page_scores(logits: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """Sum over a page's tokens of the max over query heads of the softmax probability.

    logits: fp32 [rows, n_heads, width * page_size], scaled, as `decode_attention_stats` gives them.
    lse: fp32 [rows, n_heads], their log-sum-exp.
    seq_lens: int32 [rows], visible tokens; what stands beyond is not read as a value.
    Returns fp32 [rows, width]; 0 for pages beyond the row's end.
    """
    rows, _, tokens = logits.shape
    probabilities = torch.exp(logits - lse[..., None])
    visible = torch.arange(tokens, device=logits.device) < seq_lens[:, None]
    token_scores = probabilities.amax(1).masked_fill(~visible, 0.0)
    return token_scores.view(rows, tokens // page_size, page_size).sum(-1)
