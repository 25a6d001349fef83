"""Writes new K and V into the paged pool: the oracle of the op."""

from __future__ import annotations

from torch import Tensor


def store_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Stores each token at its place, in place.

    k_cache, v_cache: [n_pages, page_size, n_kv_heads, head_dim], any strides.
    k, v: [tokens, n_kv_heads, head_dim].
    pages, offsets: int64 [tokens], the physical page and the place on it, no two alike.
    """
    for token, (page, offset) in enumerate(zip(pages.tolist(), offsets.tolist(), strict=True)):
        k_cache[page, offset] = k[token]
        v_cache[page, offset] = v[token]
