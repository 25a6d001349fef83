"""Caches with random K and V, so that any context can be measured without a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltakv.errors import InputError
from deltakv.integrations.hf import PagedCache


def fill_paged(cache: PagedCache, model: Any, lengths: Sequence[int]) -> None:
    """Makes the cache hold a row of each length, with random K and V, and none of a prefill's work.

    Memory that the cache has already is not written again. Raises `InputError` for models with windowed layers.
    """
    cache.reset()
    heads, dim = kv_shape(model.config)
    width = max(lengths)
    columns = torch.arange(width)
    cache.begin(len(lengths), width, columns >= width - torch.tensor(lengths)[:, None])
    like = torch.empty((heads, 1, dim), dtype=model.dtype, device=model.device)
    pool = cache.state.pool
    for index, window in enumerate(cache.windows):
        if window is not None:
            raise InputError("random K and V need a model whose layers have no sliding window")
        if pool.k[index] is None:
            for tensor in pool.ensure_layer(index, like):
                tensor.normal_()
    cache.commit()


def make_static(model: Any, batch: int, max_length: int) -> Any:
    """transformers' own static cache, full of random K and V; each layer's `cumulative_length` says how much counts."""
    from transformers import StaticCache

    heads, dim = kv_shape(model.config)
    cache = StaticCache(config=model.config, max_cache_len=max_length)
    cache.early_initialization(batch, heads, dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads and head dim."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, dim
