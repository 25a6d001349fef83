"""The ops of a decode step, each beside the bytes that it must move."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltakv.bench.clock import Times, timed
from deltakv.config import Delta
from deltakv.ops import decode_attention, decode_attention_stats, page_scores, select_pages

#: Layers of K and V that the runs go round in, so that none is found in a cache: their bytes together, at least.
_ROUND_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Shape:
    """One layer of a model and a batch. context: tokens of each row, the current one included."""

    batch: int
    context: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def kv_bytes(self, tokens: int) -> int:
        """K and V of `tokens` tokens of every row."""
        return 2 * self.batch * tokens * self.n_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class OpEntry:
    """What an op took. bytes: what it must read and write."""

    name: str
    times: Times
    bytes: int

    def numbers(self, bandwidth: float) -> dict[str, Any]:
        """For a JSON file. bandwidth: bytes a second of a copy in this run."""
        floor = 1e3 * self.bytes / bandwidth
        return {
            "op": self.name,
            **self.times.numbers(),
            "bytes": self.bytes,
            "floor_ms": floor,
            "share_of_floor": floor / self.times.median,
        }


def measure_ops(shape: Shape, method: Delta, runs: int, warmup: int) -> list[OpEntry]:
    """Attention of a FULL, a SELECT and a REUSE layer, scoring and picking; beside them
    FlashInfer's attention, and vLLM's FlashAttention 3 on a Hopper, where they are installed."""
    size, device = method.page_size, shape.device
    width = -(-shape.context // size)
    pools = make_pools(shape, size)
    scale = shape.head_dim**-0.5
    q = torch.randn(shape.batch, shape.n_heads, shape.head_dim, dtype=shape.dtype, device=device)
    table = torch.arange(shape.batch * width, dtype=torch.int32, device=device).view(shape.batch, 1, width)
    lens = torch.full((shape.batch, 1), shape.context, dtype=torch.int32, device=device)

    out, logits, peaks, lse = decode_attention_stats(q, *pools[0], table, lens, scale)
    scores = page_scores(logits, peaks, lse, lens[:, 0], size)
    options = (method.budget_pages, method.recent_pages, method.sink_pages, method.min_context)
    pages, n_kept = select_pages(scores, lens[:, 0], size, *options)
    compact = table[:, 0].gather(1, pages.long())[:, None]
    kept = (n_kept * size - (-lens[:, 0] % size))[:, None]
    tokens = int(kept.max())

    small = q.nbytes + out.nbytes
    per_tile = logits.nbytes + peaks.nbytes + lse.nbytes
    full, reused = shape.kv_bytes(shape.context), shape.kv_bytes(tokens)
    runs_of: list[tuple[str, Callable[[Any], Any], int]] = [
        ("attention, FULL", lambda kv: decode_attention(q, *kv, table, lens, scale), full + small),
        # What scoring needs is written, but need not be: the floor is the plain attention's.
        ("attention, SELECT", lambda kv: decode_attention_stats(q, *kv, table, lens, scale), full + small),
        ("attention, REUSE", lambda kv: decode_attention(q, *kv, compact, kept, scale), reused + small),
        ("page scores", lambda kv: page_scores(logits, peaks, lse, lens[:, 0], size), per_tile + scores.nbytes),
        ("page selection", lambda kv: select_pages(scores, lens[:, 0], size, *options), scores.nbytes + pages.nbytes),
    ]
    flash = _flashinfer(shape, q, width, size)
    if flash is not None:
        runs_of.append(("attention, FlashInfer", flash, full + small))
    flash3 = _flash_attention_3(shape, q, table, lens)
    if flash3 is not None:
        runs_of.append(("attention, FlashAttention 3", flash3, full + small))
    return [OpEntry(name, time_round(run, pools, device, runs, warmup), count) for name, run, count in runs_of]


def make_pools(shape: Shape, page_size: int) -> list[tuple[Tensor, Tensor]]:
    """K and V of a few layers, random, for runs that go round in them. Each [pages, page_size, n_kv_heads, head_dim],
    pages enough for each row of `shape`."""
    width = -(-shape.context // page_size)
    layers = max(2, -(-_ROUND_BYTES[shape.device.type] // shape.kv_bytes(shape.context)))
    return [_pool(shape, width, page_size) for _ in range(min(layers, 8))]


def _pool(shape: Shape, width: int, size: int) -> tuple[Tensor, Tensor]:
    k, v = (
        torch.randn(shape.batch * width, size, shape.n_kv_heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
        for _ in range(2)
    )
    return k, v


def time_round(
    run: Callable[[Any], Any],
    pools: list[Any],
    device: torch.device,
    runs: int,
    warmup: int,
    before: Callable[[], Any] = lambda: None,
) -> Times:
    """Milliseconds of one call. A timed run goes once round the pools, after `before`, which is not timed; on a GPU as
    one graph, or the host would be timed."""

    def once_round() -> None:
        for pool in pools:
            run(pool)

    if device.type != "cuda":
        times = timed(once_round, device, runs, warmup, before)
    else:
        once_round()  # compiles
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once_round()
        times = timed(graph.replay, device, runs, warmup, before)
    return Times([each / len(pools) for each in times.each])


def _flashinfer(shape: Shape, q: Tensor, width: int, size: int) -> Callable[[Any], Any] | None:
    """FlashInfer's paged decode attention over the same pools, where it is installed."""
    if shape.device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    space = torch.empty(256 << 20, dtype=torch.uint8, device=shape.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(0, (shape.batch + 1) * width, width, dtype=torch.int32, device=shape.device),
        torch.arange(shape.batch * width, dtype=torch.int32, device=shape.device),
        torch.full((shape.batch,), (shape.context - 1) % size + 1, dtype=torch.int32, device=shape.device),
        shape.n_heads,
        shape.n_kv_heads,
        shape.head_dim,
        size,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    return lambda kv: wrapper.run(q, kv)


def _flash_attention_3(shape: Shape, q: Tensor, table: Tensor, lens: Tensor) -> Callable[[Any], Any] | None:
    """vLLM's build of FlashAttention 3 over the same pools, as vLLM calls it for decode rows."""
    if shape.device.type != "cuda" or torch.cuda.get_device_capability(shape.device)[0] != 9:
        return None
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("vllm.vllm_flash_attn") is None:
        return None
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=shape.device)
    options = {
        "max_seqlen_q": 1,
        "cu_seqlens_q": starts,
        "max_seqlen_k": shape.context,
        "seqused_k": lens[:, 0].contiguous(),
        "softmax_scale": shape.head_dim**-0.5,
        "causal": True,
        "block_table": table[:, 0].contiguous(),
        "fa_version": 3,
    }
    return lambda kv: flash_attn_varlen_func(q, *kv, **options)
