"""What evicting methods drop, step by step on random attention, against the rules of `tests/oracle_methods.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import oracle_methods
from deltakv.methods import Tally, parse, selector

OPTIONS: dict[str, dict[str, Any]] = {
    "h2o": {"budget": 96, "recent": 32, "sinks": 0, "lag": 5},
    "a2sf": {"budget": 96, "recent": 16, "sinks": 16, "lag": 3, "forgetting": 0.7},
    "lazyeviction": {"budget": 96, "recent": 16, "sinks": 0, "lag": 9, "alpha": 0.3},
}
WIDTH, HEADS = 20, 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", OPTIONS)
def test_drops_what_the_rule_drops(name: str, seed: int) -> None:
    """Three rows of different lengths in one call, each as its rule has it; quiet and busy pages take turns."""
    method = parse(f"{name}:" + ",".join(f"{option}={value}" for option, value in OPTIONS[name].items()))
    evictor = selector(method)
    rules = [oracle_methods.RULES[name](16, **OPTIONS[name]) for _ in range(3)]
    lengths = torch.tensor([200, 90, 17], dtype=torch.int32)
    tally = Tally(
        torch.zeros(3, WIDTH, evictor.numbers),
        torch.zeros(3, WIDTH, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int32),
    )
    generator = torch.Generator().manual_seed(seed)
    habits = torch.rand(3, 1, WIDTH, generator=generator)
    for _ in range(70):
        masses = torch.rand(3, HEADS, WIDTH, generator=generator) * habits
        masses *= torch.rand(3, 1, WIDTH, generator=generator) < 0.4
        exists = torch.arange(WIDTH) * 16 < lengths[:, None]
        masses = masses.masked_fill((tally.dropped | ~exists)[:, None], 0.0)
        for row, rule in enumerate(rules):
            n = -(-int(lengths[row]) // 16)
            left = [page for page in range(n) if page not in rule.gone]
            rule.step({page: masses[row, :, page].tolist() for page in left}, n)
        before = tally
        tally = evictor.after_step(masses, tally, lengths, 16)
        assert not before.dropped.any() or (tally.dropped | before.dropped).equal(tally.dropped)
        for row, rule in enumerate(rules):
            assert set(tally.dropped[row].nonzero().flatten().tolist()) == rule.gone
        lengths = lengths + 1
    assert all(len(rule.gone) > 3 for rule in rules[:2])


def test_what_is_short_or_dense_keeps_all() -> None:
    evictor = selector(parse("h2o:budget=64,recent=32,lag=1,min_context=100"))
    tally = Tally(torch.zeros(3, 8, 1), torch.zeros(3, 8, dtype=torch.bool), torch.zeros(3, dtype=torch.int32))
    lengths = torch.tensor([64, 100, 101], dtype=torch.int32)
    dropped = evictor.after_step(torch.rand(3, 2, 8), tally, lengths, 16).dropped
    assert dropped.sum(1).tolist() == [0, 0, 3]


def test_pages_worth_nothing_are_still_worth_more_than_dropped_ones() -> None:
    """Pages that never recur are infinitely overdue; as many as the budget has room for stay all the same."""
    evictor = selector(parse("lazyeviction:budget=64,recent=16,lag=1"))
    dropped = torch.arange(12)[None] < 6
    tally = Tally(torch.zeros(1, 12, 2), dropped, torch.zeros(1, dtype=torch.int32))
    for length in (158, 159, 160):
        tally = evictor.after_step(torch.zeros(1, 2, 12), tally, torch.tensor([length], dtype=torch.int32), 16)
    assert (~tally.dropped[0, :10]).nonzero().flatten().tolist() == [6, 7, 8, 9]
