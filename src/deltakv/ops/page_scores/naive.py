"""What a page is worth to a query (DELTA, arXiv 2510.09883, section 3): the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def page_scores(logits: Tensor, peaks: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """Sum over a page's tokens of the max over query heads of the softmax probability.

    logits: floating, [rows, tiles, n_heads, tile], peaks: fp32 [rows, tiles, n_heads], lse: fp32 [rows, n_heads], as
    `decode_attention_stats` gives them; pages do not straddle tiles, or tiles pages.
    seq_lens: int32 [rows], visible tokens; what stands beyond is not read as a value.
    Returns fp32 [rows, tiles * tile / page_size]; 0 for pages beyond the row's end.
    """
    rows, tiles, n_heads, tile = logits.shape
    absolute = (logits.float() + peaks[..., None]).transpose(1, 2).reshape(rows, n_heads, tiles * tile)
    probabilities = torch.exp(absolute - lse[..., None])
    visible = torch.arange(tiles * tile, device=logits.device) < seq_lens[:, None]
    token_scores = probabilities.amax(1).masked_fill(~visible, 0.0)
    return token_scores.view(rows, -1, page_size).sum(-1)
