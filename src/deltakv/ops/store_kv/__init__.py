"""Storing new tokens in the pool, in place.

Not registered with torch.library, unlike the other ops: in PyTorch's own terms, a compiler fuses it with what makes K.
"""

from __future__ import annotations

from deltakv.ops.store_kv.vectorised import store_kv

__all__ = ["store_kv"]
