"""Writes new K and V into the paged pool with one indexed copy each."""

from __future__ import annotations

from torch import Tensor


def store_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """See `naive.store_kv`."""
    kept = slots >= 0
    if not bool(kept.all()):
        k, v, slots = k[kept], v[kept], slots[kept]
    page_size = k_cache.shape[1]
    page, offset = slots // page_size, slots % page_size
    k_cache.index_put_((page, offset), k)
    v_cache.index_put_((page, offset), v)
