"""Writes new K and V into the paged pool: the oracle of the op."""

from __future__ import annotations

from torch import Tensor


def store_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Stores each token at its slot, in place.

    k_cache, v_cache: [n_pages, page_size, n_kv_heads, head_dim], any strides.
    k, v: [tokens, n_kv_heads, head_dim].
    slots: int64 [tokens], page * page_size + offset, no two alike; a negative slot drops its token (padding).
    """
    page_size = k_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // page_size, slot % page_size] = k[token]
            v_cache[slot // page_size, slot % page_size] = v[token]
