"""The budget that a cost leaves to a plan."""

from __future__ import annotations

import pytest

from deltakv.bench.layer_times import LayerTimes
from deltakv.config import Delta, Full, Method
from deltakv.evals.paid import AttendedTokens, Cost, Paid
from deltakv.field import H2O, LessIsMore, Quest, RefreshKV, StreamingLLM, TokenSelect
from deltakv.plan import LayerPlan, paper

THREE_OF_EIGHT = LayerPlan.from_string("FFSRRRRR")

#: Up to 128 tokens a pick costs the same, as on a device that does not fill up; a Δ-layer costs half as much again.
TIMES = LayerTimes.of({400: 4.0, 500: 5.0}, {400: 6.0, 500: 7.5}, {32: 0.5, 64: 0.5, 128: 0.5, 256: 1.5, 400: 3.9})


def test_fewer_layers_that_read_everything_leave_more_to_the_others() -> None:
    base = Delta(budget=64, recent=16, sinks=16)
    paid = Paid(AttendedTokens(), THREE_OF_EIGHT, 64, (200, 300))
    budgets = {reading: method.budget for reading in range(1, 8) if (method := paid.fitted(base, reading))}
    assert budgets == {1: 96, 2: 80, 3: 64}  # four would cost 1,200 of 1,220, and leave four tokens a layer

    def cost(reading: int, budget: int, length: int) -> int:
        return reading * length + (8 - reading) * budget

    for reading, budget in budgets.items():
        within = [cost(reading, budget, length) <= cost(3, 64, length) for length in (200, 250, 300)]
        one_more = [cost(reading, budget + 16, length) <= cost(3, 64, length) for length in (200, 300)]
        assert all(within) and not all(one_more)
    assert (
        Paid(AttendedTokens(), THREE_OF_EIGHT, 64, (64, 300)).fitted(base, 3) is None
    )  # nothing would be left out at 64 tokens


@pytest.mark.parametrize("cost", [AttendedTokens(), TIMES], ids=["tokens", "time"])
def test_the_budget_is_the_largest_that_costs_no_more(cost: Cost) -> None:
    """Against all budgets, for all numbers of layers; the plan that is paid for gets its own budget, or one as dear."""
    base = Delta(budget=64, recent=16, sinks=16)
    paid = Paid(cost, paper(12), 64, (400, 500))
    seen = 0
    for full in range(11):
        for select in range(1, 12 - full):
            reuse = 12 - full - select
            fit = [
                budget
                for budget in range(16, 417, 16)
                if all(
                    cost.step(full, select, reuse, length, budget) <= cost.step(2, 3, 7, length, 64)
                    for length in (400, 500)
                )
            ]
            want = fit[-1] if fit and 48 <= fit[-1] < 400 else None
            found = paid.fitted(base, select, full)
            assert (found and found.budget) == want, (full, select)
            seen += want is not None
    assert seen > 5
    own = paid.fitted(base, 3, 2)
    assert own is not None and own.budget == (64 if cost is not TIMES else 128)
    assert paid.of(paper(12), 400, own.budget) == paid.of(paper(12), 400, 64)


def test_a_layer_that_picks_is_dearer_in_time_than_one_that_does_not() -> None:
    base = Delta(budget=64, recent=16, sinks=16)
    paid = Paid(TIMES, paper(12), 64, (400, 500))
    picking, reading = paid.fitted(base, 4), paid.fitted(base, 1, 3)
    assert picking is not None and reading is not None and picking.budget < reading.budget
    assert paid.readings(base, range(3, 8)) == [3, 4], (
        "five that all pick take longer than the paper's two that do not, and three"
    )


@pytest.mark.parametrize(
    "base", [Quest(sinks=16), StreamingLLM(), TokenSelect(), RefreshKV(), H2O()], ids=lambda m: m.algorithm
)
def test_layers_that_pick_for_themselves_read_their_picks_and_what_they_look_at(base: Method) -> None:
    """Against all budgets; with no layer that reads everything, too."""
    paid, most = Paid(AttendedTokens(), paper(12), 64, (1600, 2000)), [5 * n + 7 * 64 for n in (1600, 2000)]
    for full in range(6):

        def cost(method: Method, length: int, full: int = full) -> int:
            return full * length + (12 - full) * method.select_tokens(length)

        fit = []
        for pages in range(1, 100):
            sized = base.at_budget(pages)
            if sized is not None and all(cost(sized, n) <= paid for n, paid in zip((1600, 2000), most, strict=True)):
                fit.append(sized)
        assert paid.reading(base, full) == (fit[-1] if fit else None), full
    # What half of K a layer looks at costs more than all that the paper's plan reads.
    assert paid.readings(base, range(13))[:1] == ([] if isinstance(base, TokenSelect) else [0])
    assert paid.readings(Delta(sinks=16), range(13))[0] == 1


def test_a_method_at_another_budget() -> None:
    assert Full().at_budget(4) is None
    assert Quest(sinks=32).at_budget(3) is None
    assert Quest(sinks=32, recent=160).at_budget(8) == Quest(sinks=32, recent=48, budget=128)
    assert StreamingLLM(sinks=32).at_budget(8) == StreamingLLM(sinks=32, window=96)
    assert StreamingLLM(sinks=32).at_budget(2) is None
    assert LessIsMore().at_budget(8) == LessIsMore(budget=128)
    assert LessIsMore(recency=1.0).at_budget(8) == LessIsMore(recency=1.0, budget=128)
    assert LessIsMore(recency=0.9, sinks=16).at_budget(1) is None
