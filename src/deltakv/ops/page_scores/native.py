"""Page scores on the CPU: the C++ version, and PyTorch's where that cannot run."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deltakv.ops import native
from deltakv.ops.page_scores import by_length


def page_scores(logits: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """See `naive.page_scores`."""
    library = native.library()
    if library is None:
        return by_length.page_scores(logits, lse, seq_lens, page_size)
    rows, n_heads, tokens = logits.shape
    logits, lse, lens = logits.float().contiguous(), lse.float().contiguous(), seq_lens.int().contiguous()
    if rows and int(lens.max()) > tokens:
        raise IndexError(f"a row has {int(lens.max())} tokens, but there are logits of {tokens}")
    scores = torch.empty((rows, tokens // page_size))
    library.deltakv_page_scores(
        *(ctypes.c_void_p(native.address(tensor)) for tensor in (logits, lse, lens, scores)),
        *(ctypes.c_int64(size) for size in (rows, n_heads, tokens // page_size, page_size, torch.get_num_threads())),
    )
    return scores
