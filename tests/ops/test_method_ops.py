"""The ops of the methods beside DELTA: each against its naive version, and that against the rules of
`tests/oracle_methods.py`; poisoned where nothing may be looked at; each row as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle_methods
from deltakv import ops
from deltakv.ops.bound_scores.naive import bound_scores as naive_bounds
from deltakv.ops.interleaved.naive import interleaved as naive_interleaved
from deltakv.ops.page_masses.naive import page_masses as naive_masses
from deltakv.ops.select_mass.naive import select_mass as naive_select_mass

LENGTHS = (1, 15, 16, 17, 0, 33, 64, 100, 160, 161, 175, 176)
WIDTH, PAGE = 12, 16

Op = Callable[..., Any]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lens() -> Tensor:
    return torch.tensor(LENGTHS, dtype=torch.int32)


def pages(length: int) -> int:
    return math.ceil(length / PAGE)


def poison(x: Tensor, first: Callable[[int], int]) -> Tensor:
    """NaN in the last dimension from `first(length)` on, row by row."""
    for row, length in enumerate(LENGTHS):
        x[row, ..., max(first(length), 0) :] = math.nan
    return x


def stats(seed: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """As an attention over the rows gives them, tile by tile, with garbage beyond their ends."""
    heads, tokens = 3, WIDTH * PAGE
    logits = random(seed, len(LENGTHS), heads, tokens) * 3
    visible = torch.arange(tokens) < lens()[:, None]
    lse = torch.logsumexp(logits.masked_fill(~visible[:, None], -math.inf), dim=-1)
    poison(logits, lambda length: length)
    cut = logits.unflatten(2, (-1, tile)).transpose(1, 2).contiguous()
    peaks = random(seed + 1, len(LENGTHS), tokens // tile, heads)
    return cut - peaks[..., None], peaks, lse, lens(), PAGE


def masses(seed: int) -> Tensor:
    """[rows, heads, width], with ties, and garbage beyond the rows' ends."""
    values = (random(seed, len(LENGTHS), 3, WIDTH).abs() * 8).round() / 8
    return poison(values, pages)


def bounds(seed: int) -> tuple[Tensor, ...]:
    """q, low, high, with garbage on the last page of each row and beyond."""
    a, b = random(seed, len(LENGTHS), WIDTH, 2, 8), random(seed + 1, len(LENGTHS), WIDTH, 2, 8)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    for x in (low, high):
        for row, length in enumerate(LENGTHS):
            x[row, max(pages(length) - 1, 0) :] = math.nan
    return random(seed + 2, len(LENGTHS), 6, 8), low, high


CASES: dict[str, tuple[Op, Op, Callable[[int], tuple[Any, ...]]]] = {
    "masses": (ops.page_masses, naive_masses, lambda seed: stats(seed, WIDTH * PAGE)),
    "masses-tiles": (ops.page_masses, naive_masses, lambda seed: stats(seed, 32)),
    "bounds": (ops.bound_scores, naive_bounds, lambda seed: (*bounds(seed), lens(), 0.4, PAGE)),
    "interleaved": (ops.interleaved, naive_interleaved, lambda seed: (masses(seed), lens(), PAGE, 2, 1)),
    "interleaved-all": (ops.interleaved, naive_interleaved, lambda seed: (masses(seed), lens(), PAGE, 1, 0)),
    **{
        f"mass-{share}-{budget}-{sinks}-{dense}": (
            ops.select_mass,
            naive_select_mass,
            lambda seed, rest=(share, budget, 1, sinks, dense): (masses(seed).amax(1), lens(), PAGE, *rest),
        )
        for share, budget, sinks, dense in ((0.5, 6, 1, 0), (0.9, 12, 0, 0), (1.0, 5, 2, 0), (0.3, 4, 1, 100))
    },
}


def listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_fast_is_naive(case: str, seed: int) -> None:
    fast, naive, make = CASES[case]
    for got, want in zip(listed(fast(*make(seed))), listed(naive(*make(seed))), strict=True):
        assert got.dtype == want.dtype
        if got.dtype == torch.int32 or "interleaved" in case:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_row_alone_has_the_same_bits(case: str) -> None:
    fast, _, make = CASES[case]
    arguments = make(7)
    together = listed(fast(*arguments))
    for row in range(len(LENGTHS)):
        alone = [x[row : row + 1] if isinstance(x, Tensor) else x for x in arguments]
        for got, want in zip(listed(fast(*alone)), together, strict=True):
            assert torch.equal(got[0], want[row])


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    fast, _, make = CASES[case]
    torch.library.opcheck(fast, make(3))


def test_masses_are_the_oracle_s() -> None:
    q, k = random(0, 4, 8), random(1, 100, 2, 8)
    kv = k.repeat_interleave(2, dim=1)
    logits = torch.einsum("hd,thd->ht", q, kv) * 0.5
    padded = torch.full((4, 112), math.nan)
    padded[:, :100] = logits
    length = torch.tensor([100], dtype=torch.int32)
    got = naive_masses(padded[None, None], torch.zeros(1, 1, 4), logits.logsumexp(-1)[None], length, 16)[0]
    for head, p in enumerate(oracle_methods.probabilities(q, k, 0.5, None)):
        want = [sum(p[start : start + 16]) for start in range(0, 100, 16)]
        assert got[head].tolist() == pytest.approx(want, abs=1e-6)


def test_bounds_are_the_oracle_s_and_bounds_indeed() -> None:
    q, k = random(0, 4, 8), random(1, 100, 2, 8)
    rule = oracle_methods.Quest(16, budget=32, recent=16, sinks=0)
    paged = k[:96].unflatten(0, (-1, 16))
    low, high = (torch.cat([x, torch.full((1, 2, 8), math.nan)])[None] for x in (paged.amin(1), paged.amax(1)))
    got = naive_bounds(q[None], low, high, torch.tensor([100], dtype=torch.int32), 0.5, 16)[0, :6]
    assert got.tolist() == pytest.approx(rule.at(q, k, 0.5, None).scores[:6], abs=1e-5)
    assert (got <= 0).all() and got.max() == 0
    # For one head alone: no token of a page is worth more than the page's bound.
    one = naive_bounds(q[None, :1], low[:, :, :1], high[:, :, :1], torch.tensor([100], dtype=torch.int32), 0.5, 16)
    logits = (k[:96, 0] @ q[0] * 0.5).unflatten(0, (-1, 16)).amax(1)
    best = torch.maximum(q[0] * low[0, :6, 0], q[0] * high[0, :6, 0]).sum(-1).max() * 0.5
    assert (logits <= one[0, :6] + best + 1e-5).all()


def test_a_share_is_reached_and_no_page_is_too_many() -> None:
    for seed in range(20):
        values = random(seed, 1, WIDTH).abs()
        length = torch.tensor([WIDTH * PAGE - 3], dtype=torch.int32)
        kept, n = ops.select_mass(values, length, PAGE, 0.7, WIDTH, 1, 1, 0)
        chosen = kept[0, : int(n)].tolist()
        held = values[0, chosen].sum()
        assert held >= 0.7 * values.sum()
        least = min((p for p in chosen if p not in (0, WIDTH - 1)), key=lambda p: values[0, p], default=None)
        assert least is None or held - values[0, least] < 0.7 * values.sum()
