"""The kernels of a step on a GPU: how long each ran, and what each part of the step must read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: Parts of a step by their kernels' names, the first that fits; what fits none is the last: norms, RoPE, activations,
#: the K/V store, argmax.
_PARTS = {
    "attention": r"^_(attend|merge)$|flash|fmha|sdpa",
    "scoring and picking": r"^_(score|select)$",
    "matrix products": r"nvjet|gemm|gemv|cutlass|cublas|splitK|_mm\b",
    "the rest": r"",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel of one step: how often it ran, and for how long in all."""

    name: str
    calls: int
    microseconds: float


def kernels_of(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels of one run, those that took longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = [Kernel(event.key, event.count, event.device_time_total) for event in profiler.key_averages()]
    return sorted((kernel for kernel in found if kernel.microseconds), key=lambda kernel: -kernel.microseconds)


def parts(kernels: Sequence[Kernel], weight_bytes: float, kv_bytes: float, bandwidth: float) -> list[dict[str, Any]]:
    """Kernels taken together by what they do, for a JSON file; empty without kernels. The bytes are those that must be
    read, at `bandwidth` bytes a second their floor: K and V by attention, weights by products, nothing by the rest."""
    grouped: dict[str, list[Kernel]] = {part: [] for part in _PARTS} if kernels else {}
    for kernel in kernels:
        grouped[next(part for part, names in _PARTS.items() if re.search(names, kernel.name))].append(kernel)
    must = {"attention": kv_bytes, "matrix products": weight_bytes}
    return [
        {
            "part": part,
            "calls": sum(kernel.calls for kernel in group),
            "microseconds": sum(kernel.microseconds for kernel in group),
            "bytes": round(must.get(part, 0)),
            "floor_us": 1e6 * must.get(part, 0) / bandwidth,
        }
        for part, group in grouped.items()
    ]
