"""chunk_attention and chunk_logits against the dense reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from deltakv import ops
from deltakv.ops.chunk_attention.naive import chunk_attention as naive_attention
from deltakv.ops.chunk_attention.naive import chunk_logits as naive_logits

Op = Callable[..., Any]
ATTENTION = [pytest.param(ops.chunk_attention, id="registered"), pytest.param(naive_attention, id="naive")]
LOGITS = [pytest.param(ops.chunk_logits, id="registered"), pytest.param(naive_logits, id="naive")]

#: (positions m, tokens T) around the edges of pages.
SIZES = [
    (1, 1),
    (1, 16),
    (1, 17),
    (5, 5),
    (16, 16),
    (17, 33),
    (15, 31),
    (40, 100),
    (33, 257),
    (64, 64),
    (3, 1000),
]

CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"n_heads": 4, "n_kv": 4, "head_dim": 64},
    "mqa": {"n_heads": 5, "n_kv": 1, "head_dim": 80},
    "wide": {"n_heads": 8, "n_kv": 2, "head_dim": 128, "sinks": True},
    "sinks": {"sinks": True},
    "views": {"views": True},
}


def make_chunk(
    m: int,
    tokens: int,
    *,
    n_heads: int = 4,
    n_kv: int = 2,
    head_dim: int = 16,
    sinks: bool = False,
    views: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """q, k, v, scale and sinks; `views`: as transformers has them, [heads, tokens, dim] transposed."""
    generator = torch.Generator().manual_seed(seed + 31 * m + tokens)
    q = (torch.randn(m, n_heads, head_dim, generator=generator) * 2).to(dtype)
    k, v = torch.randn(2, tokens, n_kv, head_dim, generator=generator).to(dtype)
    if views:
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    sink_logits = (torch.randn(n_heads, generator=generator) + 1).to(dtype) if sinks else None
    return q, k, v, head_dim**-0.5, sink_logits


def random_kept(m: int, tokens: int, page_size: int, seed: int) -> Tensor:
    """A random set of pages for each position, always with the page of the position itself."""
    n_pages = math.ceil(tokens / page_size)
    kept = torch.rand(m, n_pages, generator=torch.Generator().manual_seed(seed)) < 0.4
    for i in range(m):
        kept[i, (tokens - m + i) // page_size] = True
    return kept


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sinks: Tensor | None,
    kept: Tensor | None = None,
    page_size: int = 16,
) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i in range(len(q)):
        position = len(k) - len(q) + i
        visible = torch.tensor(
            [t <= position and (kept is None or bool(kept[i, t // page_size])) for t in range(len(k))]
        )
        out[i] = oracle.attention(q[i], k, v, visible, scale, sinks)[0]
    return out


def assert_near(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("case", CASES)
def test_full_attention_equals_dense_reference(op: Op, case: str) -> None:
    for m, tokens in SIZES:
        q, k, v, scale, sinks = make_chunk(m, tokens, **CASES[case])
        out = op(q, k, v, scale, sinks)
        assert out.shape == q.shape and out.dtype == q.dtype
        want = reference(q, k, v, scale, sinks)
        assert_near(out, want, f"{m} of {tokens}")


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("case", ["gqa", "mqa", "sinks", "views"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_kept_pages_equal_dense_reference(op: Op, case: str, page_size: int) -> None:
    for m, tokens in SIZES:
        q, k, v, scale, sinks = make_chunk(m, tokens, **CASES[case])
        kept = random_kept(m, tokens, page_size, seed=m)
        out = op(q, k, v, scale, sinks, kept, page_size)
        want = reference(q, k, v, scale, sinks, kept, page_size)
        assert_near(out, want, f"{m} of {tokens}")


@pytest.mark.parametrize("op", ATTENTION)
def test_keeping_all_is_full_attention_and_pages_ahead_stay_hidden(op: Op) -> None:
    """`kept` never shows a position what comes after it."""
    q, k, v, scale, sinks = make_chunk(40, 100, sinks=True)
    everything = torch.ones(40, 7, dtype=torch.bool)
    want = reference(q, k, v, scale, sinks)
    torch.testing.assert_close(op(q, k, v, scale, sinks, everything, 16).double(), want, rtol=0, atol=1e-5)
    up_to_own = torch.zeros(40, 7, dtype=torch.bool)
    for i in range(40):
        up_to_own[i, : (60 + i) // 16 + 1] = True
    torch.testing.assert_close(op(q, k, v, scale, sinks, up_to_own, 16).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("sparse", [False, True])
def test_many_positions(op: Op, sparse: bool) -> None:
    """Enough positions and tokens for any blocking to have several blocks, and a rest."""
    m, tokens = 300, 1307
    q, k, v, scale, sinks = make_chunk(m, tokens, n_heads=2, n_kv=1, sinks=True)
    kept = random_kept(m, tokens, 16, seed=3) if sparse else None
    out = op(q, k, v, scale, sinks, kept, 16)
    some = [0, 1, 63, 64, 127, 128, 255, 256, 298, 299]
    for i in some:
        position = tokens - m + i
        visible = torch.arange(tokens) <= position
        if kept is not None:
            visible &= kept[i].repeat_interleave(16)[:tokens]
        want = oracle.attention(q[i], k, v, visible, scale, sinks)[0]
        assert_near(out[i], want, f"position {i}")


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("sparse", [False, True])
def test_bfloat16_is_as_good_as_stock_attention(op: Op, sparse: bool) -> None:
    m, tokens = 120, 700
    q, k, v, scale, _ = make_chunk(m, tokens, n_heads=8, head_dim=64, dtype=torch.bfloat16)
    kept = random_kept(m, tokens, 16, seed=4) if sparse else None
    visible = torch.arange(tokens)[None] <= torch.arange(tokens - m, tokens)[:, None]
    if kept is not None:
        visible &= kept.repeat_interleave(16, dim=1)[:, :tokens]
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=visible, scale=scale, enable_gqa=True
    )[0].transpose(0, 1)
    exact = reference(q, k, v, scale, None, kept)
    out = op(q, k, v, scale, None, kept, 16)
    assert out.dtype == torch.bfloat16
    ours, theirs = (out.double() - exact).abs(), (stock.double() - exact).abs()
    assert theirs.max() < 0.02, "the yardstick itself must be sound"
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt() + 1e-5
    assert ours.max() <= 1.5 * theirs.max() + 1e-3, f"largest: {ours.max():.4f} and {theirs.max():.4f}"


@pytest.mark.parametrize("op", LOGITS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_dense_reference(op: Op, case: str, page_size: int, dtype: torch.dtype) -> None:
    for m, tokens in SIZES:
        q, k, _, scale, sinks = make_chunk(m, tokens, dtype=dtype, **CASES[case])
        logits, lse = op(q, k, scale, sinks, page_size)
        n_heads, n_pages = q.shape[1], math.ceil(tokens / page_size)
        assert logits.dtype == lse.dtype == torch.float32
        assert logits.shape == (m, n_heads, n_pages * page_size) and lse.shape == (m, n_heads)
        repeated = k.double().repeat_interleave(n_heads // k.shape[1], dim=1)
        exact = torch.einsum("mhd,thd->mht", q.double(), repeated) * scale
        for i in range(m):
            seen = tokens - m + i + 1
            assert (logits[i, :, seen:] == -math.inf).all(), f"position {i} of {m}, {tokens} tokens"
            torch.testing.assert_close(logits[i, :, :seen].double(), exact[i, :, :seen], rtol=1e-6, atol=1e-5)
            terms = exact[i, :, :seen]
            if sinks is not None:
                terms = torch.cat([terms, sinks.double()[:, None]], dim=1)
            torch.testing.assert_close(lse[i].double(), torch.logsumexp(terms, 1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("sinks", [False, True])
def test_logits_feed_page_scores_and_picks(page_size: int, sinks: bool) -> None:
    """The chain of the evaluation mode: each position's pick is the reference's."""
    m, tokens, limits = 60, 400, (5, 1, 1, 0)
    q, k, _, scale, sink_logits = make_chunk(m, tokens, sinks=sinks)
    logits, lse = ops.chunk_logits(q, k, scale, sink_logits, page_size)
    lengths = torch.arange(tokens - m + 1, tokens + 1, dtype=torch.int32)
    scores = ops.page_scores(logits[:, None], torch.zeros_like(lse)[:, None], lse, lengths, page_size)
    pages, n_kept = ops.select_pages(scores, lengths, page_size, *limits)
    for i, length in enumerate(lengths.tolist()):
        want_scores = oracle.page_scores(q[i], k, scale, length, page_size, sink_logits)
        torch.testing.assert_close(
            scores[i, : len(want_scores)].double(),
            torch.tensor(want_scores, dtype=torch.float64),
            rtol=2e-5,
            atol=1e-30,
        )
        want = oracle.pick(want_scores, length, page_size, *limits)
        got = pages[i, : int(n_kept[i])].tolist()
        assert oracle.picks_agree(got, want, want_scores, 4e-5 * max(want_scores)), f"position {i}"


def test_arguments_are_left_alone() -> None:
    q, k, v, scale, sinks = make_chunk(17, 33, sinks=True)
    kept = random_kept(17, 33, 16, seed=0)
    before = [x.clone() for x in (q, k, v, kept)]
    ops.chunk_attention(q, k, v, scale, sinks, kept, 16)
    ops.chunk_logits(q, k, scale, sinks, 16)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, kept), strict=True))
