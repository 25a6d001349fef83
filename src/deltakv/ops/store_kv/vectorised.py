"""Writes new K and V into the paged pool with one indexed copy each."""

from __future__ import annotations

from torch import Tensor


def store_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """See `naive.store_kv`."""
    if len(slots) and int(slots.min()) < 0:
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    page_size = k_cache.shape[1]
    for cache, new in ((k_cache, k), (v_cache, v)):
        if cache.stride(0) == page_size * cache.stride(1):  # tokens follow each other across pages
            cache.flatten(0, 1).index_copy_(0, slots, new)
        else:
            cache.index_put_((slots // page_size, slots % page_size), new)
