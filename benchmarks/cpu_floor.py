"""What this machine's memory gives, and what each part of a decode step takes of it: SmolLM2's shapes, fp32.

    python benchmarks/cpu_floor.py benchmarks/results/NAME.json

Every part is timed over tensors that together are far larger than the caches, medians of several rounds. Bytes are
those that must be read once: weights, K and V of the tokens attended to.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from deltakv.bench.provenance import provenance
from deltakv.ops import decode_attention, decode_attention_stats

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM = 576, 1536, 30, 9, 3, 64
CONTEXT, BUDGET, PAGE, BATCH, POOLS = 8000, 1024, 16, 8, 12


def rate(run: Callable[[], Any], bytes_read: int, rounds: int = 9) -> float:
    """GB/s of the median round, after two to warm up."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return bytes_read / statistics.median(seconds[2:]) / 1e9


def measure() -> dict[str, float]:
    """GB/s by part."""
    big = torch.randn(1 << 27)
    found = {"sum of a large tensor": rate(big.sum, big.nbytes)}
    del big
    shapes = [(HIDDEN, HIDDEN), (2 * KV_HEADS * DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in shapes]
    size = sum(weight.nbytes for weight in weights)
    for batch in (1, BATCH):
        inputs = {width: torch.randn(batch, width) for width in (HIDDEN, INNER)}
        found[f"the model's linear layers, batch {batch}"] = rate(
            lambda inputs=inputs: [F.linear(inputs[weight.shape[1]], weight) for weight in weights], size
        )
    pages = -(-CONTEXT // PAGE)
    q = torch.randn(BATCH, HEADS, DIM)
    pools = [
        tuple(torch.randn(KV_HEADS, BATCH * pages, PAGE, DIM).permute(1, 2, 0, 3) for _ in range(2))
        for _ in range(POOLS)
    ]
    table = torch.arange(BATCH * pages, dtype=torch.int32).view(BATCH, 1, pages)
    lens = torch.full((BATCH, 1), CONTEXT, dtype=torch.int32)
    kept = torch.stack([torch.randperm(pages)[: BUDGET // PAGE].sort().values for _ in range(BATCH)])
    compact = table[:, 0].gather(1, kept)[:, None].contiguous()
    short = torch.full((BATCH, 1), BUDGET, dtype=torch.int32)
    token = 2 * KV_HEADS * DIM * 4 * BATCH * POOLS
    for name, op, where, length, tokens in (
        ("attention of a FULL layer", decode_attention, table, lens, CONTEXT),
        ("attention of a SELECT layer", decode_attention_stats, table, lens, CONTEXT),
        ("attention of a REUSE layer", decode_attention, compact, short, BUDGET),
    ):
        found[f"{name}, batch {BATCH}"] = rate(
            lambda op=op, where=where, length=length: [op(q, k, v, where, length, DIM**-0.5) for k, v in pools],
            token * tokens,
        )
    return found


if __name__ == "__main__":
    result = {**provenance(), "gigabytes_a_second": measure()}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for part, speed in result["gigabytes_a_second"].items():
        print(f"{speed:6.1f} GB/s  {part}")
