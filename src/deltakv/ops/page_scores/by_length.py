"""Page scores in PyTorch, for the CPU: rows of one length together, over their own pages only."""

from __future__ import annotations

import torch
from torch import Tensor


def page_scores(logits: Tensor, peaks: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """See `naive.page_scores`."""
    rows, tiles, _heads, tile = logits.shape
    shift = peaks - lse[:, None]
    scores = torch.zeros((rows, tiles * tile // page_size), dtype=torch.float32)
    of_length: dict[int, list[int]] = {}
    for row, seq_len in enumerate(seq_lens.tolist()):
        of_length.setdefault(seq_len, []).append(row)
    for seq_len, chosen in of_length.items():
        if seq_len == 0:
            continue
        pages, used = -(-seq_len // page_size), -(-seq_len // tile)
        some = slice(None) if len(chosen) == rows else chosen
        width = seq_len if used == 1 else tile
        above = logits[some, :used, :, :width] + shift[some, :used, :, None]
        probabilities = above.amax(2).exp_().flatten(1)[:, :seq_len]
        token_scores = torch.zeros((len(chosen), pages * page_size))
        token_scores[:, :seq_len] = probabilities
        scores[chosen, :pages] = token_scores.view(len(chosen), pages, page_size).sum(-1)
    return scores
