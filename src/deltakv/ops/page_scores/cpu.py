"""Page scores on the CPU: each row on its own, over its own pages only, so that neighbours change nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def page_scores(logits: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """See `naive.page_scores`."""
    rows, _, tokens = logits.shape
    scores = torch.zeros((rows, tokens // page_size), dtype=torch.float32)
    for row, seq_len in enumerate(seq_lens.tolist()):
        if seq_len == 0:
            continue
        pages = -(-seq_len // page_size)
        probabilities = (logits[row, :, :seq_len] - lse[row, :, None]).exp_()
        token_scores = torch.zeros(pages * page_size)
        torch.amax(probabilities, 0, out=token_scores[:seq_len])
        scores[row, :pages] = token_scores.view(pages, page_size).sum(-1)
    return scores
