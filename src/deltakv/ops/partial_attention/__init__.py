"""Attention over chunks of a row's tokens, one after the other, merged by log-sum-exp (arXiv 1805.02867).

Always called outside of compiled regions (chunks come from host memory), hence not registered.
"""

from deltakv.ops.partial_attention.batched import partial_attention
from deltakv.ops.partial_attention.naive import merge

__all__ = ["merge", "partial_attention"]
