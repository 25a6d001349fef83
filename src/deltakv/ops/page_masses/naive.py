"""The attention that each head puts on each page: the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def page_masses(logits: Tensor, peaks: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """Sum over a page's tokens of the softmax probability, each query head by itself.

    Arguments as those of `page_scores`; what stands beyond a row's end is not read as a value.
    Returns fp32 [rows, n_heads, tiles * tile / page_size]; 0 for pages beyond the row's end.
    """
    rows, tiles, n_heads, tile = logits.shape
    masses = torch.zeros((rows, n_heads, tiles * tile // page_size), device=logits.device)
    for row in range(rows):
        for token in range(int(seq_lens[row])):
            at, offset = divmod(token, tile)
            logit = logits[row, at, :, offset].float() + peaks[row, at]
            masses[row, :, token // page_size] += torch.exp(logit - lse[row])
    return masses
