"""The search for plans, on losses that are given."""

from __future__ import annotations

import pytest

from deltakv.evals.plan_search import KEPT, best_of, neighbours, search_plan
from deltakv.plan import LayerPlan


def distance(target: str) -> tuple[list[tuple[str, bool]], object]:
    """A loss that says how far a plan is from `target`, and what it was asked."""
    asked: list[tuple[str, bool]] = []

    def loss(plan: LayerPlan, thorough: bool) -> float:
        asked.append((str(plan), thorough))
        layers, wanted = [[i for i, letter in enumerate(p) if letter in "FS"] for p in (str(plan), target)]
        places = sum(min(abs(layer - other) for other in layers) for layer in wanted)
        return 10.0 * places + sum(a != b for a, b in zip(str(plan), target, strict=True))

    return asked, loss


@pytest.mark.parametrize(
    "target", ["SRRRSRRRRSRR", "FSRRRRSRRRFR", "FFSRRRRRRRRS", "SSSRRRRRRRRR", "WWWSRRRSRRRS", "FWWSRRRRRSRR"]
)
def test_it_finds_what_is_best(target: str) -> None:
    """With and without the first layer among those that read."""
    _, loss = distance(target)
    reading = target.count("F") + target.count("S")
    assert str(search_plan(12, [reading], loss, rounds=12)) == target  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["FSSSFSSSSFSS", "SSSSFSSSSSSF", "FFSSSSSSSSSS"])
def test_where_layers_pick_for_themselves_others_are_full(target: str) -> None:
    def loss(plan: LayerPlan, thorough: bool) -> float:
        full, wanted = ([i for i, letter in enumerate(letters) if letter == "F"] for letters in (str(plan), target))
        assert set(str(plan)) <= {"F", "S"}
        return sum(min((abs(layer - other) for other in full), default=12) for layer in wanted) + 0.1 * len(full)

    assert str(search_plan(12, [target.count("F")], loss, rounds=12, own_picks=True)) == target


def test_with_no_layer_that_reads_everything_there_is_one_plan() -> None:
    every = LayerPlan.from_string("SSSS")
    assert search_plan(4, [0], lambda plan, thorough: 0.0, [every], own_picks=True) == every
    worse = search_plan(4, [0, 1], lambda plan, thorough: float(plan == every), [every], own_picks=True)
    assert str(worse).count("F") == 1


def test_a_plan_to_begin_with_counts_and_is_kept_if_nothing_is_better() -> None:
    begin = LayerPlan.from_string("FSRRRRRR")
    assert search_plan(8, [2], lambda plan, thorough: float(plan != begin), [begin], rounds=3) == begin


def test_of_several_numbers_of_reading_layers_the_best_is_kept() -> None:
    asked, loss = distance("SRRRRSRRRRRR")
    assert str(search_plan(12, [1, 2, 3], loss, rounds=12)) == "SRRRRSRRRRRR"  # type: ignore[arg-type]
    reached = {letters.count("S") for letters, _ in asked}
    # Of four, one layer more than is allowed, the first may be left out; and a single one may read without picking.
    assert reached == {0, 1, 2, 3, 4}


def test_another_number_of_reading_layers_may_be_best_in_the_end() -> None:
    """With three to begin with they are ahead, and stay there; with two there is one step to something better."""

    def loss(plan: LayerPlan, thorough: bool) -> float:
        if str(plan) == "FSRRRRRR":
            return 0.0
        return {3: 1.0, 2: 2.0, 1: 3.0}.get(plan.reads_in_full, 4.0)

    assert str(search_plan(8, [1, 2, 3], loss)) == "FSRRRRRR"


def test_only_the_best_are_looked_at_again() -> None:
    asked, loss = distance("SRRRRRRRRRRRRRRS")
    value, plan = best_of((LayerPlan.from_layers(16, select=(0, other)) for other in range(1, 16)), loss)  # type: ignore[arg-type]
    assert str(plan) == "SRRRRRRRRRRRRRRS" and value == 0
    assert sum(thorough for _, thorough in asked) == KEPT and len(asked) == 15 + KEPT


def test_a_quick_look_may_be_wrong_and_ties_go_to_the_earlier() -> None:
    plans = [LayerPlan.from_string(letters) for letters in ("SRRS", "SRSR", "SSRR")]
    wrong = {plans[0]: 0.0, plans[1]: 1.0, plans[2]: 2.0}
    right = {plans[0]: 5.0, plans[1]: 1.0, plans[2]: 1.0}
    assert best_of(plans, lambda plan, thorough: (right if thorough else wrong)[plan]) == (1.0, plans[1])


def test_neighbours_cost_the_same_and_are_plans() -> None:
    plan = LayerPlan.from_string("FSRRRSRR")
    near = list(neighbours(plan))
    assert len(near) == len(set(near)) == 13 and plan not in near
    for other in near:
        assert other.reads_in_full == plan.reads_in_full
        assert sum(a.value in "FS" for a in other.roles) == 3
    assert LayerPlan.from_string("FSRRRFRR") in near and LayerPlan.from_string("SSRRRSRR") in near
    assert LayerPlan.from_string("WSSRRSRR") in list(neighbours(LayerPlan.from_string("SRSRRSRR")))
    for other in near:
        first = str(other).index("S")
        assert "R" not in str(other)[:first] and "W" not in str(other)[first:]
