"""Paged decode attention: one query token a row, grouped queries, optional softmax statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.decode_attention import naive, native
from deltakv.ops.registry import register

_ARGUMENTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, float scale, Tensor? sinks=None"
)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _fake_stats(q: Tensor, k_cache: Tensor, _v: Tensor, block_table: Tensor, *_: object) -> tuple[Tensor, ...]:
    rows, n_heads, _dim = q.shape
    tokens = block_table.shape[-1] * k_cache.shape[1]
    return (
        q.new_empty(q.shape),
        q.new_empty((rows, n_heads, tokens), dtype=torch.float32),
        q.new_empty((rows, n_heads), dtype=torch.float32),
    )


decode_attention = register(
    f"decode_attention({_ARGUMENTS}) -> Tensor",
    cpu=native.decode_attention,
    cuda=naive.decode_attention,
    fake=_fake,
)
decode_attention_stats = register(
    f"decode_attention_stats({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=native.decode_attention_stats,
    cuda=naive.decode_attention_stats,
    fake=_fake_stats,
)
