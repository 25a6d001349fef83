"""Measures what `Profile` holds, on the machine at hand."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltakv.errors import OffloadError
from deltakv.offload.codecs import InputCodec, PlainCodec
from deltakv.offload.layer import Recompute
from deltakv.offload.memory import available_bytes, gibibytes
from deltakv.offload.profile import Profile, Timing
from deltakv.offload.scheduler import LayerShape
from deltakv.ops import accumulate

#: Bytes of the copies: from what a single token takes to what a chunk does.
COPIES = tuple(1 << power for power in range(12, 28, 3))
#: Tokens, all rows together, of recomputation and attention.
TOKENS = tuple(1 << power for power in range(6, 15, 2))
#: Rows of a decode step.
ROWS = (1, 4, 16, 64)
#: Timed runs, after one that warms up.
RUNS = 5


def machine_name(device: torch.device) -> str:
    """What a profile is kept under: this host, its GPU and the software that drives it."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{gpu}, {platform.node()}, {platform.machine()}, torch {torch.__version__}"


def measure(
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    recompute: Recompute,
    rest: Callable[[int], object],
    *,
    copies: Sequence[int] = COPIES,
    tokens: Sequence[int] = TOKENS,
    rows: Sequence[int] = ROWS,
) -> Profile:
    """Seconds, on an idle machine.

    heads: query heads. recompute: K and V from X of one layer, weights included. rest: runs a decode step of one layer
    without its cache, for so many rows. copies, tokens, rows: the sizes to measure at, ascending.
    Raises `OffloadError` if the host has no room for the largest copy.
    """
    if available_bytes() < 2 * copies[-1]:
        raise OffloadError(f"measuring needs {gibibytes(2 * copies[-1])} of host memory, and less is free")
    pinned = _copies(device, copies, pinned=device.type == "cuda")
    pageable = _copies(device, copies, pinned=False)

    def recomputing(count: int) -> Callable[[], object]:
        inputs = InputCodec(shape.hidden, dtype)
        x = torch.randn((count, 1, shape.hidden), dtype=dtype, device=device)
        records = inputs.encode(x, torch.arange(count, device=device)[:, None])  # as they arrive, side by side
        return lambda: recompute(*inputs.decode(records))

    def attending(count: int) -> Callable[[], object]:
        batch, plain = min(count, 8), PlainCodec(shape.kv_heads, shape.head_dim, dtype)
        q = torch.randn((batch, heads, 1, shape.head_dim), dtype=dtype, device=device)
        k = torch.randn((count // batch, batch, shape.kv_heads, shape.head_dim), dtype=dtype, device=device)
        k, v = plain.decode(plain.encode(k, k))
        out, lse = torch.zeros(q.shape, device=device), torch.full(q.shape[:3], float("-inf"), device=device)
        return lambda: accumulate(q, k, v, 1.0, out, lse)

    with torch.no_grad():
        return Profile(
            machine=machine_name(device),
            dtype=str(dtype).removeprefix("torch."),
            shape=(shape.hidden, shape.kv_heads, shape.head_dim),
            to_device=pinned[0],
            to_host=pinned[1],
            to_device_pageable=pageable[0],
            to_host_pageable=pageable[1],
            recompute=tuple(Timing(size, _seconds(device, recomputing(size))) for size in tokens),
            attention=tuple(Timing(size, _seconds(device, attending(size))) for size in tokens),
            rest=tuple(Timing(size, _seconds(device, lambda size=size: rest(size))) for size in rows),  # type: ignore[misc]
        )


def _copies(
    device: torch.device, sizes: Sequence[int], *, pinned: bool
) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
    """Copies to the device and to the host, by bytes."""
    there = torch.empty(sizes[-1], dtype=torch.uint8, device=device)
    here = torch.zeros(sizes[-1], dtype=torch.uint8, pin_memory=pinned)

    def copying(target: Tensor, source: Tensor) -> Callable[[], object]:
        return lambda: target.copy_(source, non_blocking=pinned)

    to_device = tuple(Timing(n, _seconds(device, copying(there[:n], here[:n]))) for n in sizes)
    to_host = tuple(Timing(n, _seconds(device, copying(here[:n], there[:n]))) for n in sizes)
    return to_device, to_host


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The median of several runs, in turns that are long enough to be timed."""
    work()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    once = max(time.perf_counter() - start, 1e-7)
    repeats = max(1, min(100, int(2e-3 / once)))
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        taken.append((time.perf_counter() - start) / repeats)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
