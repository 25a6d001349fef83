"""Paged decode attention: one query token a row, grouped queries, optional softmax statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.decode_attention import native
from deltakv.ops.registry import Lazy, register

_triton = Lazy("deltakv.ops.decode_attention.triton")  # Triton comes with torch's CUDA builds alone

_ARGUMENTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, float scale, Tensor? sinks=None"
)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _fake_stats(q: Tensor, k_cache: Tensor, _v: Tensor, block_table: Tensor, *_: object) -> tuple[Tensor, ...]:
    rows, n_heads, _dim = q.shape
    tokens, dtype = block_table.shape[-1] * k_cache.shape[1], torch.float32
    tiles, tile = 1, tokens
    if q.device.type == "cuda":
        tile, dtype = _triton.tile_tokens(q, k_cache.shape[2]), torch.float16
        tiles = -(-tokens // tile)
    return (
        q.new_empty(q.shape),
        q.new_empty((rows, tiles, n_heads, tile), dtype=dtype),
        q.new_empty((rows, tiles, n_heads), dtype=torch.float32),
        q.new_empty((rows, n_heads), dtype=torch.float32),
    )


decode_attention = register(
    f"decode_attention({_ARGUMENTS}) -> Tensor",
    cpu=native.decode_attention,
    cuda=_triton.decode_attention,
    fake=_fake,
)
decode_attention_stats = register(
    f"decode_attention_stats({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=native.decode_attention_stats,
    cuda=_triton.decode_attention_stats,
    fake=_fake_stats,
)
