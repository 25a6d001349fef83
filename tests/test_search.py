"""IndexCache's search over plans, on losses that are known."""

from __future__ import annotations

import itertools

import pytest

from deltakv.methods.indexcache import search
from deltakv.plan import LayerPlan, Role


def cost(weights: list[float], plan: LayerPlan) -> float:
    """Each shared layer costs its weight times how far its pick comes from."""
    total, last = 0.0, 0
    for layer, role in enumerate(plan.roles):
        last = layer if role is Role.SELECT else last
        total += weights[layer] * (layer - last)
    return total


def test_each_round_shares_the_layer_that_costs_least() -> None:
    weights = [0.0, 5.0, 1.0, 3.0, 1.0]
    calls: list[str] = []

    def loss(plan: LayerPlan) -> float:
        calls.append(str(plan))
        return cost(weights, plan)

    rounds = list(search(5, loss, full=2))
    # Layers 2 and 4 tie at first, and the earlier goes; then 4; then 1 (for 8 with what it takes along; 3: 10).
    assert [(str(plan), value) for plan, value in rounds] == [("SSRSS", 1.0), ("SSRSR", 2.0), ("SRRSR", 8.0)]
    assert calls[:4] == ["SRSSS", "SSRSS", "SSSRS", "SSSSR"]
    assert len(calls) == 4 + 3 + 2


def test_greedy_is_never_better_than_the_best_and_here_it_is_that() -> None:
    weights = [0.0, 4.0, 1.0, 1.0, 6.0, 1.0]
    plan, value = list(search(6, lambda plan: cost(weights, plan), full=3))[-1]
    every = ("S" + "".join(rest) for rest in itertools.product("SR", repeat=5) if rest.count("S") == 2)
    assert value == min(cost(weights, LayerPlan.from_string(letters)) for letters in every)
    assert str(plan) == "SSRRSR"


def test_the_first_layer_stays_and_ends_are_checked() -> None:
    assert [str(plan) for plan, _ in search(3, lambda plan: 0.0, full=1)] == ["SRS", "SRR"]
    assert list(search(3, lambda plan: 0.0, full=3)) == []
    for full in (0, 4):
        with pytest.raises(ValueError, match=f"full={full} of 3 layers"):
            list(search(3, lambda plan: 0.0, full=full))
