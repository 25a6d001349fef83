"""The versions of decode attention, random batches for them, and what the dense reference says of those."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_ops
from paged_inputs import EQUAL, LENGTHS, LONG, Paged, make_paged
from torch import Tensor

from deltakv import ops
from deltakv.ops.decode_attention import flash
from deltakv.ops.decode_attention.naive import decode_attention as naive_attention
from deltakv.ops.decode_attention.naive import decode_attention_stats as naive_stats
from oracle import attention

Op = Callable[..., Any]
ATTENTION = [
    pytest.param(ops.decode_attention, id="registered"),
    pytest.param(flash.decode_attention, id="pytorch"),
    pytest.param(triton_ops.attention, id="triton", marks=pytest.mark.gpu),
    pytest.param(naive_attention, id="naive"),
]
STATS = [
    pytest.param(ops.decode_attention_stats, id="registered"),
    pytest.param(flash.decode_attention_stats, id="pytorch"),
    pytest.param(naive_stats, id="naive"),
]
#: What applications run; the naive versions say what is meant and promise no bits.
RUNNING = [
    pytest.param(ops.decode_attention, id="attention"),
    pytest.param(ops.decode_attention_stats, id="stats"),
    pytest.param(flash.decode_attention, id="pytorch-attention"),
    pytest.param(flash.decode_attention_stats, id="pytorch-stats"),
    pytest.param(triton_ops.attention, id="triton-attention", marks=pytest.mark.gpu),
    pytest.param(triton_ops.attention_stats, id="triton-stats", marks=pytest.mark.gpu),
]

#: The layout of the library's own pool.
OWN = "heads_outermost"

#: What is varied in one random batch over LENGTHS; every value stands beside several others.
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"n_heads": 4, "n_kv": 4, "head_dim": 64, "table": "contiguous", "layout": OWN},
    "mqa": {"n_heads": 5, "n_kv": 1, "head_dim": 80, "page_size": 32, "table": "shared"},
    "wide": {"n_heads": 12, "n_kv": 2, "head_dim": 128, "layout": "interleaved", "table": "shared"},
    "sinks": {"sinks": True, "layout": "heads_first", "table": "shared"},
    "sinks-wide": {"n_heads": 8, "n_kv": 2, "head_dim": 64, "page_size": 64, "sinks": True, "layout": OWN},
    "page-32": {"page_size": 32, "layout": "interleaved", "head_dim": 80, "table": "contiguous"},
    "page-32-shared": {"page_size": 32, "layout": OWN, "head_dim": 80, "table": "shared", "n_heads": 6, "n_kv": 3},
    "page-64": {"page_size": 64, "layout": "heads_first", "head_dim": 128},
    "page-128": {"page_size": 128, "layout": "interleaved", "table": "shared", "extra_width": 0},
    "exact-width": {"extra_width": 0, "table": "contiguous", "n_heads": 2, "n_kv": 1},
    "very-wide": {"extra_width": 200, "head_dim": 64, "layout": OWN},
    "sharp": {"sharpness": 40.0, "head_dim": 64, "layout": OWN},
    "sharp-sinks": {"sharpness": 40.0, "sinks": True},
    "flat": {"sharpness": 0.0, "page_size": 32},
    "equal": {"lengths": EQUAL, "table": "contiguous", "layout": OWN},
    "equal-scattered": {"lengths": EQUAL, "table": "permuted", "layout": OWN, "sinks": True},
    "equal-interleaved": {"lengths": EQUAL, "table": "contiguous", "layout": "interleaved", "n_heads": 8},
    "all-equal": {"lengths": (333,) * 5, "table": "contiguous", "layout": OWN, "head_dim": 64},
    "all-equal-sinks": {"lengths": (64,) * 9, "table": "permuted", "sinks": True, "n_kv": 1},
    "long": {"lengths": LONG, "table": "halves", "head_dim": 64, "layout": "interleaved"},
    "long-sinks": {"lengths": LONG, "layout": OWN, "page_size": 32, "sinks": True, "n_heads": 8},
}

#: Tokens of each row, for either of two groups of heads.
GROUPED = [[0, 40], [16, 17], [33, 1], [64, 64], [300, 290], [1, 0], [129, 257]]


def make_case(case: str, **more: Any) -> Paged:
    return make_paged(**{"lengths": LENGTHS, **CASES[case], **more})


def reference(batch: Paged) -> tuple[Tensor, list[list[Tensor]], Tensor]:
    """The oracle's output [rows, n_heads, d], logits [row][head] of visible tokens, lse [rows, n_heads]."""
    rows, n_heads, _ = batch.q.shape
    groups = batch.seq_lens.shape[1]
    per_group = n_heads // groups
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    lse = torch.full((rows, n_heads), -math.inf, dtype=torch.float64)
    logits: list[list[Tensor]] = [[torch.empty(0)] * n_heads for _ in range(rows)]
    for row in range(rows):
        for group in range(groups):
            heads = slice(group * per_group, (group + 1) * per_group)
            k, v = batch.keys[row][group], batch.values[row][group]
            sinks = None if batch.sinks is None else batch.sinks[heads]
            visible = torch.ones(len(k), dtype=torch.bool)
            out[row, heads] = attention(batch.q[row, heads], k, v, visible, batch.scale, sinks)[0]
            for head in range(heads.start, heads.stop):
                kv = (head - heads.start) // (per_group // k.shape[1])
                logits[row][head] = k[:, kv].double() @ batch.q[row, head].double() * batch.scale
                terms = logits[row][head]
                if batch.sinks is not None:
                    terms = torch.cat([terms, batch.sinks[head].double().reshape(1)])
                lse[row, head] = torch.logsumexp(terms, 0) if len(terms) else -math.inf
    return out, logits, lse


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def with_two_threads(op: Op) -> Op:
    """The op with two threads, and the test around it as before."""

    def threaded(*arguments: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return op(*arguments)
        finally:
            torch.set_num_threads(before)

    return threaded
