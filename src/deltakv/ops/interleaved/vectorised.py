"""All rankings by sorting, without a look at a value on the host."""

from __future__ import annotations

import torch
from torch import Tensor


def interleaved(masses: Tensor, seq_lens: Tensor, page_size: int, recent_pages: int, sink_pages: int) -> Tensor:
    """See `naive.interleaved`."""
    _, n_heads, width = masses.shape
    page = torch.arange(width, device=masses.device)
    n = ((seq_lens + page_size - 1) // page_size)[:, None]
    contending = ((page >= sink_pages) & (page < n - recent_pages))[:, None]
    order = torch.argsort(masses.masked_fill(~contending, float("-inf")), dim=2, descending=True, stable=True)
    rank = torch.zeros_like(order).scatter(2, order, page.expand_as(order))
    place = rank * n_heads + torch.arange(n_heads, device=masses.device)[:, None]
    return (-place).amax(1).float().masked_fill(~contending[:, 0], float("-inf"))
