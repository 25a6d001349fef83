"""Page scores on the CPU: the C++ version, and PyTorch's where that cannot run."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deltakv.ops import native
from deltakv.ops.page_scores import by_length


def page_scores(logits: Tensor, peaks: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """See `naive.page_scores`."""
    library = native.library()
    if library is None:
        return by_length.page_scores(logits, peaks, lse, seq_lens, page_size)
    rows, tiles, n_heads, tile = logits.shape
    logits, shift = logits.float().contiguous(), (peaks - lse[:, None]).contiguous()
    lens, width = seq_lens.int().contiguous(), tiles * tile // page_size
    if rows and int(lens.max()) > tiles * tile:
        raise IndexError(f"a row has {int(lens.max())} tokens, but there are logits of {tiles * tile}")
    scores = torch.empty((rows, width))
    library.deltakv_page_scores(
        *(ctypes.c_void_p(native.address(tensor)) for tensor in (logits, shift, lens, scores)),
        *(ctypes.c_int64(n) for n in (rows, tiles, n_heads, tile, width, page_size, torch.get_num_threads())),
    )
    return scores
