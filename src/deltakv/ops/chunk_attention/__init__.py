"""Attention of many query positions on one row: prefill, verification, and evaluation mode.

Always called outside of compiled regions (its shapes change with every call), hence not registered.
"""

from deltakv.ops.chunk_attention.blocked import causal_attention, chunk_attention, chunk_logits

__all__ = ["causal_attention", "chunk_attention", "chunk_logits"]
