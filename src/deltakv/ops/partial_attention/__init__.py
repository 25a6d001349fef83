"""Attention over chunks of a row's tokens, one after the other, merged by log-sum-exp (arXiv 1805.02867).

Always called outside of compiled regions (chunks come from host memory), hence not registered.
"""

from torch import Tensor

from deltakv.ops.partial_attention import batched
from deltakv.ops.partial_attention.batched import partial_attention
from deltakv.ops.partial_attention.naive import merge, within
from deltakv.ops.registry import Lazy

__all__ = ["accumulate", "merge", "partial_attention", "within"]

_triton = Lazy("deltakv.ops.partial_attention.triton")  # Triton comes with torch's CUDA builds alone


def accumulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    start: int = 0,
    lengths: Tensor | None = None,
) -> None:
    """See `naive.accumulate`: in one kernel where a GPU takes a decode step, else in products and a merge."""
    one_kernel = q.is_cuda and q.shape[2] == 1 and q.stride(3) == k.stride(3) == v.stride(3) == 1
    (_triton.accumulate if one_kernel else batched.accumulate)(q, k, v, scale, out, lse, start, lengths)
