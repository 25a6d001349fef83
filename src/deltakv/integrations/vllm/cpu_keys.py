"""K as vLLM's CPU attention stores it, read back as tokens.

The kernel packs the K of a block for its own matrix products, differently for each data type, block size and
instruction set. Where it puts each number is asked of the kernel itself: a permutation, and so exact.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from vllm import _custom_ops as ops

#: Digits in which places are written: small enough to be exact in bfloat16.
_BASE = 128


@functools.cache
def places(dtype: torch.dtype, block_size: int, head_size: int, isa: str) -> Tensor:
    """int64 [block_size, head_size]: where in a block's K, read as one run of numbers, each token's numbers lie."""
    numbers = block_size * head_size
    own = torch.arange(numbers)
    found = torch.zeros(numbers, dtype=torch.int64)
    slots = torch.arange(block_size)
    for power in range(3):
        digit = (own // _BASE**power % _BASE).view(block_size, 1, head_size).to(dtype)
        block = torch.zeros((1, 1, 2 * block_size, head_size), dtype=dtype)
        k_cache, v_cache = block.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digit, digit, k_cache, v_cache, slots, isa)
        found += k_cache.flatten().long() * _BASE**power
    where = torch.empty(numbers, dtype=torch.int64)
    where[found] = own
    if not torch.equal(found[where], own):
        raise AssertionError(f"vLLM's CPU kernel ({isa}) does not keep every number of K once")
    return where.view(block_size, head_size)


def row_keys(kv_cache: Tensor, pages: Tensor, where: Tensor) -> Tensor:
    """The K of a row's pages, token by token.

    kv_cache: vLLM's, [n_blocks, n_kv_heads, block_size, 2 * head_size], a block's K before its V.
    pages: int [n], blocks; where: as `places` gives it. Returns [n * block_size, n_kv_heads, head_size].
    """
    block_size, head_size = where.shape
    n_kv = kv_cache.shape[1]
    packed = kv_cache.flatten(2)[pages.long(), :, : block_size * head_size]
    tokens = packed[:, :, where.flatten()].view(-1, n_kv, block_size, head_size)
    return tokens.transpose(1, 2).reshape(-1, n_kv, head_size)
