"""Paged attention on the CPU: the C++ version, and PyTorch's where that cannot run."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deltakv.ops import native
from deltakv.ops.decode_attention import flash

_SEGMENT = 512  # tokens of a unit of work; as in native.cpp

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class _Call(ctypes.Structure):
    """`Call` of native.cpp, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v")),
        *((f"{tensor}_{stride}", _INT) for tensor in "kv" for stride in ("page", "token", "head")),
        *((name, _POINTER) for name in ("table", "lens", "sinks", "out", "logits", "lse", "partials")),
        *((name, _INT) for name in ("rows", "n_heads", "n_kv", "groups", "n_pages", "width", "page_size", "dim")),
        *((name, _INT) for name in ("segments", "threads")),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
    )


def _library(k_cache: Tensor, v_cache: Tensor) -> ctypes.CDLL | None:
    """The C++ ops, if they serve such a cache: fp32 or bf16, and each token's numbers side by side."""
    served = (
        k_cache.dtype == v_cache.dtype
        and k_cache.dtype in (torch.float32, torch.bfloat16)
        and k_cache.stride(3) == v_cache.stride(3) == 1
    )
    return native.library() if served else None


def _run(
    library: ctypes.CDLL,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None,
    logits: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    rows, n_heads, dim = q.shape
    n_pages, page_size, n_kv, _ = k_cache.shape
    groups, width = block_table.shape[1:]
    segments = -(-width * page_size // _SEGMENT)
    out = torch.empty((rows, n_heads, dim), dtype=torch.float32)
    # Named, so that they live until the call is over.
    queries, table, lens = q.float().contiguous(), block_table.int().contiguous(), seq_lens.int().contiguous()
    learned = None if sinks is None else sinks.float().contiguous()
    call = _Call(
        *map(native.address, (queries, k_cache, v_cache)),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *map(native.address, (table, lens, learned, out, logits, lse)),
        native.address(native.scratch(rows * segments * n_heads * (2 + dim))),
        *(rows, n_heads, n_kv, groups, n_pages, width, page_size, dim),
        *(segments, torch.get_num_threads()),
        scale,
        k_cache.dtype == torch.bfloat16,
    )
    if library.deltakv_decode_attention(ctypes.byref(call)):
        if int(lens.max()) > width * page_size:
            raise IndexError(
                f"a row has {int(lens.max())} tokens, and its block table has room for {width * page_size}"
            )
        raise IndexError(f"the block table names a page that the cache, of {n_pages} pages, does not have")
    return out.to(q.dtype)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `naive.decode_attention`."""
    library = _library(k_cache, v_cache)
    if library is None:
        return flash.decode_attention(q, k_cache, v_cache, block_table, seq_lens, scale, sinks)
    return _run(library, q, k_cache, v_cache, block_table, seq_lens, scale, sinks, None, None)


def decode_attention_into(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None,
    out: Tensor,
    expected: int,
) -> None:
    """See `naive.decode_attention_into`. Work is cut by each row's length, so nothing is expected of it."""
    out.copy_(decode_attention(q, k_cache, v_cache, block_table, seq_lens, scale, sinks))


def decode_attention_stats(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `naive.decode_attention_stats`. K and V are read once."""
    library = _library(k_cache, v_cache)
    if library is None:
        return flash.decode_attention_stats(q, k_cache, v_cache, block_table, seq_lens, scale, sinks)
    rows, n_heads, _ = q.shape
    logits = torch.empty((rows, 1, n_heads, block_table.shape[2] * k_cache.shape[1]))
    lse = torch.empty((rows, n_heads))
    out = _run(library, q, k_cache, v_cache, block_table, seq_lens, scale, sinks, logits, lse)
    return out, logits, torch.zeros_like(lse)[:, None], lse
