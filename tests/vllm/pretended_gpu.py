"""The GPU backend on a machine without a GPU: vLLM's CPU engine runs it on CPU tensors.

Everything is what runs on a GPU (vLLM's batches and metadata, the backend, deltakv's ops in their CPU versions) but
two kernels, for which plain PyTorch stands in: FlashAttention, and the one that stores K and V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flash_attn_varlen_func(
    *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, block_table: Tensor,
    softmax_scale: float, causal: bool, window_size: list[int], **_: Any,
) -> None:  # fmt: skip
    """Causal attention of the last tokens of each row over its pages. q: [tokens, heads, dim]."""
    assert causal and len(q) == int(cu_seqlens_q[-1]) and len(block_table) == len(seqused_k) == len(cu_seqlens_q) - 1
    for row, length in enumerate(seqused_k.tolist()):
        first, end = cu_seqlens_q[row : row + 2].tolist()
        pages = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (x[pages].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // k.shape[2], 1) for x in (k, v))
        ahead = torch.arange(length) - torch.arange(length - end + first, length)[:, None]
        hidden = (ahead > 0) | ((ahead < -window_size[0]) if window_size[0] >= 0 else False)
        logits = torch.einsum("qhd,khd->hqk", q[first:end], keys) * softmax_scale
        weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), -1)
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, values)


def reshape_and_cache_flash(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *_: Any
) -> None:
    """Stores K and V of the tokens that have a slot."""
    real = slot_mapping >= 0
    pages, slots = slot_mapping[real] // key_cache.shape[1], slot_mapping[real] % key_cache.shape[1]
    key_cache[pages, slots] = key[: len(slot_mapping)][real]
    value_cache[pages, slots] = value[: len(slot_mapping)][real]


def install() -> None:
    """Makes CUSTOM what it is on a GPU, in vLLM's CPU engine. Called after the plugin is loaded."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    flash_attn.flash_attn_varlen_func = flash_attn_varlen_func
    flash_attn.reshape_and_cache_flash = reshape_and_cache_flash
    for name in ("get_flash_attn_version", "flash_attn_supports_sinks"):
        setattr(flash_attn, name, lambda *_, **__: 2)  # 3 would ask the GPU for a schedule
    path = "deltakv.integrations.vllm.gpu.SparseGPUBackend"
    for place in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):  # the CPU platform takes no other
        register_backend(place, path)
