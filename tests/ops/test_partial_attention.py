"""Attention over parts: each version against a softmax in double, and parts merged against the whole."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_ops import DTYPES, ON_GPU

from deltakv.ops.partial_attention import merge
from deltakv.ops.partial_attention.batched import partial_attention as batched
from deltakv.ops.partial_attention.naive import partial_attention as naive

VERSIONS = (naive, batched)


def inputs(rows: int, kv: int, group: int, width: int, tokens: int, dim: int, seed: int = 0) -> Any:
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, kv * group, width, dim, generator=made) * 2
    k, v = (torch.randn(tokens, rows, kv, dim, generator=made) for _ in range(2))
    return q, k, v


def softmax(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Query by query, in double. seen: bool [rows, heads, width, tokens]."""
    rows, heads, width, dim = q.shape
    out, lse = torch.zeros(rows, heads, width, dim), torch.full((rows, heads, width), float("-inf"))
    for r in range(rows):
        for h in range(heads):
            for w in range(width):
                which = seen[r, h, w].nonzero().flatten()
                if len(which):
                    head = h * k.shape[2] // heads
                    logits = k[which, r, head].double() @ q[r, h, w].double() * scale
                    out[r, h, w] = (torch.softmax(logits, 0) @ v[which, r, head].double()).float()
                    lse[r, h, w] = logits.logsumexp(0).float()
    return out, lse


@pytest.mark.parametrize("version", VERSIONS)
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 9))
def test_against_a_softmax(
    version: Callable[..., Any], rows: int, kv: int, group: int, width: int, tokens: int, seed: int
) -> None:
    q, k, v = inputs(rows, kv, group, width, tokens, 8, seed)
    seen = torch.rand(rows, 1, width, tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    expected = softmax(q, k, v, 0.3, seen.expand(rows, kv * group, width, tokens))
    unseen = ~seen[:, 0].any(1).T  # [tokens, rows]: nobody may look
    k[unseen], v[unseen] = float("nan"), float("nan")
    for ours, theirs in zip(version(q, k, v, 0.3, seen), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("edges", [(0, 40), (0, 1, 40), (0, 7, 19, 40), tuple(range(41))], ids=len)
def test_parts_merged_are_the_whole(version: Callable[..., Any], edges: tuple[int, ...]) -> None:
    q, k, v = inputs(2, 2, 2, 3, 40, 16)
    out, lse = torch.zeros(2, 4, 3, 16), torch.full((2, 4, 3), float("-inf"))
    for start, stop in itertools.pairwise(edges):
        out, lse = merge(out, lse, *version(q, k[start:stop], v[start:stop], 0.25))
    expected = softmax(q, k, v, 0.25, torch.ones(2, 4, 3, 40, dtype=torch.bool))
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)


def test_merging_nothing_with_nothing() -> None:
    nothing = (torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), float("-inf")))
    out, lse = merge(*nothing, *nothing)
    assert torch.equal(out, nothing[0]) and torch.equal(lse, nothing[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_lose_no_more_than_their_rounding(dtype: torch.dtype) -> None:
    """Against the same numbers in fp32: weights are rounded once, sums are not."""
    q, k, v = (x.to(dtype) for x in inputs(2, 2, 2, 1, 300, 64))
    ours, lse = batched(q, k, v, 0.125)
    exact, exact_lse = naive(q, k, v, 0.125)
    assert ours.dtype == lse.dtype == torch.float32
    assert (ours - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    torch.testing.assert_close(lse, exact_lse, atol=1e-4, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_any_strides(version: Callable[..., Any]) -> None:
    q, k, v = inputs(2, 2, 2, 1, 12, 16)
    record = torch.cat([k.flatten(2), v.flatten(2), torch.full((12, 2, 3), float("nan"))], dim=-1)
    views = (record[..., :32].unflatten(-1, (2, 16)), record[..., 32:64].unflatten(-1, (2, 16)))
    for ours, expected in zip(version(q, *views, 0.25), version(q, k, v, 0.25), strict=True):
        torch.testing.assert_close(ours, expected)


def accumulated(version: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`accumulate` in that version: out and lse, which it changes; in Triton on the GPU or in its interpreter."""
    module = importlib.import_module(f"deltakv.ops.partial_attention.{version}")
    moved = [x.cuda() if ON_GPU and isinstance(x, Tensor) else x for x in arguments]
    module.accumulate(*moved)
    return moved[4].cpu(), moved[5].cpu()


SHAPES = [(2, 4, 1, 16), (3, 2, 3, 64), (1, 1, 20, 80), (2, 3, 1, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["naive", "batched", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "kv", "group", "dim"), SHAPES)
def test_accumulated_on_the_gpu(version: str, dtype: torch.dtype, rows: int, kv: int, group: int, dim: int) -> None:
    check_accumulated(version, dtype, rows, kv, group, dim, (0, 64, 65, 301, 1000))


@pytest.mark.parametrize("version", ["naive", "batched", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "kv", "group", "dim"), SHAPES)
def test_accumulated(version: str, dtype: torch.dtype, rows: int, kv: int, group: int, dim: int) -> None:
    check_accumulated(version, dtype, rows, kv, group, dim, (0, 16, 17, 70))


def check_accumulated(
    version: str, dtype: torch.dtype, rows: int, kv: int, group: int, dim: int, edges: tuple[int, ...]
) -> None:
    """Piece by piece, from rows that differ in length (one of none), against the whole; what no row has is NaN, and K
    and V lie as in a record."""
    q, k, v = (x.to(dtype) for x in inputs(rows, kv, group, 1, edges[-1], dim))
    lengths = torch.tensor([edges[-1], 0, edges[-1] - 20][:rows])
    seen = torch.arange(edges[-1]) < lengths[:, None]
    k[~seen.T], v[~seen.T] = float("nan"), float("nan")
    record = torch.cat([k.flatten(2), v.flatten(2), torch.full((len(k), rows, 8), float("nan"), dtype=dtype)], dim=-1)
    width = kv * dim
    k, v = (record[..., at : at + width].unflatten(-1, (kv, dim)) for at in (0, width))
    out, lse = torch.zeros(rows, kv * group, 1, dim), torch.full((rows, kv * group, 1), float("-inf"))
    for start, stop in itertools.pairwise(edges):
        some = None if bool(seen[:, start:stop].all()) else lengths
        out, lse = accumulated(version, q, k[start:stop], v[start:stop], dim**-0.5, out, lse, start, some)
    exact = naive(q.float(), k.float(), v.float(), dim**-0.5, seen[:, None, None])
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out, exact[0], atol=rounding, rtol=rounding)
    torch.testing.assert_close(lse, exact[1], atol=1e-4, rtol=1e-4)
