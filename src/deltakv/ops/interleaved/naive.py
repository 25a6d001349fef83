"""Many rankings made one (LessIsMore, arXiv 2508.07101, section 3): the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def interleaved(masses: Tensor, seq_lens: Tensor, page_size: int, recent_pages: int, sink_pages: int) -> Tensor:
    """The place of each page in the list: every head's best page, head by head, then every head's second, and so on.

    masses: fp32 [rows, n_heads, width], what each head finds on a page. seq_lens: int32 [rows]. Sinks and recent pages
    are in anyway and have no place; ties of a head go to the earlier page.
    Returns fp32 [rows, width]: minus the page's first place, counted from 0; -inf for a page without one.
    """
    rows, n_heads, width = masses.shape
    scores = torch.full((rows, width), float("-inf"), device=masses.device)
    for row in range(rows):
        n = -(-int(seq_lens[row]) // page_size)
        contending = range(sink_pages, max(n - recent_pages, sink_pages))
        for head in range(n_heads):
            values = masses[row, head].tolist()
            for rank, page in enumerate(sorted(contending, key=lambda page: -values[page])):
                scores[row, page] = max(scores[row, page].item(), -(rank * n_heads + head))
    return scores
