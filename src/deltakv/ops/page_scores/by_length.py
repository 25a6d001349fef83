"""Page scores in PyTorch, for the CPU: rows of one length together, over their own pages only."""

from __future__ import annotations

import torch
from torch import Tensor


def page_scores(logits: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """See `naive.page_scores`."""
    rows, _, tokens = logits.shape
    scores = torch.zeros((rows, tokens // page_size), dtype=torch.float32)
    of_length: dict[int, list[int]] = {}
    for row, seq_len in enumerate(seq_lens.tolist()):
        of_length.setdefault(seq_len, []).append(row)
    for seq_len, chosen in of_length.items():
        if seq_len == 0:
            continue
        pages = -(-seq_len // page_size)
        same = logits if len(chosen) == rows else logits[chosen]
        above = same[..., :seq_len] - (lse if len(chosen) == rows else lse[chosen])[..., None]
        token_scores = torch.zeros((len(chosen), pages * page_size))
        token_scores[:, :seq_len] = above.amax(1).exp_()
        scores[chosen, :pages] = token_scores.view(len(chosen), pages, page_size).sum(-1)
    return scores
