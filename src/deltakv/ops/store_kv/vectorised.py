"""Writes new K and V into the paged pool with one indexed copy each."""

from __future__ import annotations

from torch import Tensor


def store_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """See `naive.store_kv`."""
    # On the pool itself, not on a view of it: a compiler then writes in place and copies nothing else.
    k_cache.index_put_((pages, offsets), k)
    v_cache.index_put_((pages, offsets), v)
