"""Page scores on a GPU, in Triton: one pass over the logits, one exponential a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens of a program.
_BLOCK = 512


@triton.jit
def _score(
    logits,
    peaks,
    lse,
    lens,
    scores,
    logits_row,
    logits_tile,
    logits_head,
    peaks_row,
    peaks_tile,
    width,
    PAGE: tl.constexpr,
    N_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """TILES tiles of one row, head after head, so that each thread keeps its tokens. Grid: (blocks, rows)."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    PAGES: tl.constexpr = TILES * TILE // PAGE
    length = tl.load(lens + row)
    page = block * PAGES + tl.arange(0, PAGES)
    if block * TILES * TILE >= length:
        tl.store(scores + row * width + page, tl.zeros([PAGES], tl.float32), mask=page < width)
        return
    tile, slot = block * TILES + tl.arange(0, TILES), tl.arange(0, TILE)
    begun = tile * TILE < length
    token = tile[:, None] * TILE + slot[None, :]
    # Pages are there to their end: loads that stop at a page and not at a token are as wide as can be.
    held = token // PAGE * PAGE < length
    best = tl.full([TILES, TILE], float("-inf"), tl.float32)
    for head in tl.range(N_HEADS, loop_unroll_factor=UNROLL):
        peak = tl.load(peaks + row * peaks_row + tile * peaks_tile + head, mask=begun, other=0.0)
        norm = tl.load(lse + row * N_HEADS + head)
        where = row * logits_row + tile * logits_tile + head * logits_head
        logit = tl.load(logits + where[:, None] + slot[None, :], mask=held, other=float("-inf"))
        # The largest probability is that of the largest logit less its log-sum-exp.
        best = tl.maximum(best, logit.to(tl.float32) + (peak - norm)[:, None])
    weight = tl.where(token < length, tl.exp(best), 0.0)
    total = tl.sum(tl.reshape(weight, [PAGES, PAGE]), 1)
    tl.store(scores + row * width + page, total, mask=page < width)


def page_scores(logits: Tensor, peaks: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """See `naive.page_scores`. There is one tile, or its tokens are a power of two."""
    rows, tiles, n_heads, tile = logits.shape
    logits, peaks, lse, seq_lens = (x.contiguous() for x in (logits, peaks, lse, seq_lens))
    width = tiles * tile // page_size
    scores = torch.empty((rows, width), dtype=torch.float32, device=logits.device)
    # One tile for all is the same as many that have the same peak.
    strides = (n_heads * tile, 128, tile, n_heads, 0) if tiles == 1 else (*logits.stride()[:3], *peaks.stride()[:2])
    tile = 128 if tiles == 1 else tile
    together = _BLOCK // tile
    if scores.numel():
        _score[(triton.cdiv(width * page_size, together * tile), rows)](
            logits,
            peaks,
            lse,
            seq_lens,
            scores,
            *strides,
            width,
            PAGE=page_size,
            N_HEADS=n_heads,
            TILE=tile,
            TILES=together,
            UNROLL=4,
            num_warps=4,
        )
    return scores
