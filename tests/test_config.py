"""Methods' configurations: what holds together is kept as given, what does not is refused in plain words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltakv
from deltakv.config import PAGE_SIZES
from deltakv.methods import REGISTRY, from_options, parse, selector


def test_defaults() -> None:
    method = deltakv.Delta()
    assert (method.budget, method.recent, method.sinks, method.page_size) == (1024, 128, 16, 16)
    assert (method.budget_pages, method.recent_pages, method.sink_pages) == (64, 8, 1)
    assert method.plan is None
    # Below the budget nothing is left out, so a smaller threshold would promise what cannot be.
    assert method.min_context >= method.budget


def test_frozen_and_comparable() -> None:
    method = deltakv.Delta(budget=512)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.budget = 256  # type: ignore[misc]
    assert method == deltakv.Delta(budget=512) != deltakv.Delta()
    assert hash(method) == hash(deltakv.Delta(budget=512))
    assert dataclasses.replace(method, budget=1024) == deltakv.Delta()
    with pytest.raises(deltakv.ConfigError):
        dataclasses.replace(method, budget=1000)


def test_only_by_keyword() -> None:
    with pytest.raises(TypeError):
        deltakv.Delta(1024)  # type: ignore[misc]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_budgets_count_whole_pages(page_size: int) -> None:
    method = deltakv.Delta(page_size=page_size, budget=1024, recent=256, sinks=128)
    assert method.budget_pages * page_size == 1024
    assert method.recent_pages * page_size == 256
    assert method.sink_pages * page_size == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 8}, r"page_size=8 is not one of \(16, 32, 64, 128\)"),
        ({"page_size": 0}, "page_size=0"),
        ({"page_size": "16"}, "page_size='16'"),
        ({"page_size": 16.0}, "page_size=16.0"),
        ({"page_size": True}, "page_size=True"),
        ({"budget": 1000}, "budget=1000 is not a multiple of the page size 16; the nearest are 992 and 1008"),
        ({"recent": 100}, "recent=100 is not a multiple of the page size 16; the nearest are 96 and 112"),
        ({"sinks": 4}, "sinks=4 is not a multiple of the page size 16; the nearest are 0 and 16"),
        ({"page_size": 128}, "sinks=16 is not a multiple of the page size 128"),
        ({"budget": 0}, r"budget=0 must be at least 16 tokens \(1 pages\)"),
        ({"budget": -64}, "budget=-64 must be at least 16"),
        ({"recent": 0}, "recent=0 must be at least 16"),
        ({"sinks": -16}, "sinks=-16 must be at least 0"),
        ({"budget": 64.0}, "budget=64.0 must be a whole number"),
        ({"budget": True}, "budget=True must be a whole number"),
        ({"budget": "1024"}, "budget='1024' must be a whole number"),
        ({"budget": None}, "budget=None must be a whole number"),
        ({"budget": 128}, "recent=128 and sinks=16 do not fit into budget=128; raise the budget to at least 144"),
        ({"budget": 64, "recent": 64, "sinks": 16}, "do not fit into budget=64"),
        ({"min_context": -1}, "min_context=-1 must be a whole number of tokens, 0 or more"),
        ({"min_context": 0.5}, "min_context=0.5"),
        ({"min_context": False}, "min_context=False"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(deltakv.ConfigError, match=message):
        deltakv.Delta(**options)


def test_edges_are_allowed() -> None:
    assert deltakv.Delta(budget=16, recent=16, sinks=0).budget_pages == 1
    assert deltakv.Delta(budget=144, recent=128, sinks=16).budget_pages == 9
    assert deltakv.Delta(min_context=0).min_context == 0


@given(
    budget=st.integers(-32, 400),
    recent=st.integers(-32, 400),
    sinks=st.integers(-32, 400),
    page_size=st.sampled_from(PAGE_SIZES),
)
def test_whatever_is_accepted_holds_together(budget: int, recent: int, sinks: int, page_size: int) -> None:
    """Accepted exactly if all are whole pages, recent at least one, sinks at least none, and both fit the budget."""
    good = (
        not (budget % page_size or recent % page_size or sinks % page_size)
        and recent >= page_size
        and sinks >= 0
        and recent + sinks <= budget
    )
    try:
        method = deltakv.Delta(budget=budget, recent=recent, sinks=sinks, page_size=page_size)
    except deltakv.ConfigError:
        assert not good
    else:
        assert good
        assert method.recent_pages + method.sink_pages <= method.budget_pages


def test_full_takes_no_plan() -> None:
    assert str(deltakv.Full().layer_plan(5)) == "FFFFF"
    with pytest.raises(deltakv.ConfigError, match="takes no plan"):
        deltakv.Full(plan="FFF")
    with pytest.raises(TypeError):
        deltakv.Full(budget=64)  # type: ignore[call-arg]


def test_errors_are_value_errors() -> None:
    for error in (
        deltakv.ConfigError,
        deltakv.InputError,
        deltakv.MaskError,
        deltakv.PlanError,
        deltakv.UnsupportedModelError,
        deltakv.UnsupportedUseError,
    ):
        assert issubclass(error, deltakv.DeltaKVError) and issubclass(error, ValueError)


class TestByName:
    """As a command line or a server's config writes them."""

    def test_every_method_has_its_name_and_selector(self) -> None:
        assert set(REGISTRY) == {
            "a2sf",
            "h2o",
            "indexcache",
            "lazyeviction",
            "delta",
            "full",
            "lessismore",
            "quest",
            "refreshkv",
            "streaming",
            "tactic",
            "tidal",
            "tokenselect",
        }
        for name, config in REGISTRY.items():
            assert config.algorithm == name
            assert selector(config()) is not None

    def test_parse(self) -> None:
        assert parse("full") == deltakv.Full()
        assert parse("delta") == deltakv.Delta()
        assert parse(" delta: budget = 512 ,sinks=0,plan=FFSRRR ") == deltakv.Delta(budget=512, sinks=0, plan="FFSRRR")
        assert parse("delta:budget=2_048,") == deltakv.Delta(budget=2048)
        assert parse("full:page_size=64") == deltakv.Full(page_size=64)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("quests", "unknown method 'quests'; allowed are a2sf, delta, full"),
            ("quest:similarity=1", "method 'quest' has no option 'similarity'"),
            ("tactic:mass=most", "mass='most' in method .* is not a number"),
            ("tactic:mass=0", "mass=0.0 must be a number above 0 to 1"),
            ("tactic:mass=nan", "mass=nan must be a number above 0 to 1"),
            ("tokenselect:similarity=1.1", "similarity=1.1 must be a number from 0 to 1"),
            ("refreshkv:stride=0", "stride=0 must be a whole number of steps"),
            ("refreshkv:stride=2.5", "stride='2.5' .* is not a whole number"),
            ("lessismore:recency=-0.5", "recency=-0.5 must be a number above 0 to 1"),
            ("lessismore:recent=32", "recent=32: the recent tokens are a share of the budget; give recency"),
            ("lessismore:recency=1,sinks=16", "do not fit into budget"),
            ("streaming:window=0", "window=0 must be at least 16 tokens"),
            ("streaming:window=40", "window=40 is not a multiple"),
            ("quest:budget=16,sinks=16", "do not fit into budget=16"),
            ("h2o:lag=0", "lag=0 must be a whole number of steps"),
            ("a2sf:forgetting=1.5", "forgetting=1.5 must be a number above 0 to 1"),
            ("lazyeviction:alpha=0", "alpha=0.0 must be a number above 0 to 1"),
            ("", "unknown method ''"),
            ("delta:budgets=512", "method 'delta' has no option 'budgets'; allowed are .*budget"),
            ("full:budget=512", "method 'full' has no option 'budget'"),
            ("delta:budget", "'budget' in method 'delta:budget' is not of the form option=value"),
            ("delta:budget=", "is not of the form option=value"),
            ("delta:budget=many", "budget='many' in method .* is not a whole number"),
            ("delta:budget=1e3", "budget='1e3' .* is not a whole number"),
            ("delta:budget=512,budget=512", "gives the option 'budget' twice"),
            ("delta:budget=1000", "budget=1000 is not a multiple"),
            ("full:plan=FF", "takes no plan"),
        ],
        ids=str,
    )
    def test_refused(self, text: str, message: str) -> None:
        with pytest.raises(deltakv.ConfigError, match=message):
            parse(text)

    def test_parse_fractions_and_default_plans(self) -> None:
        assert parse("tactic:mass=0.75,budget=512") == deltakv.Tactic(mass=0.75, budget=512)
        assert parse("refreshkv:stride=4,similarity=1").similarity == 1
        assert parse("lessismore:budget=160,recency=0.4").recent_pages == 4
        plans = {name: str(parse(name).layer_plan(8)) for name in REGISTRY}
        assert plans["streaming"] == "SRRRRRRR"
        assert plans["quest"] == "FFSSSSSS"
        assert plans["tidal"] == plans["lessismore"] == "FFSSRRRR"
        assert plans["tactic"] == plans["delta"]
        assert plans["tokenselect"] == plans["refreshkv"] == "SSSSSSSS"

    def test_what_a_select_layer_reads(self) -> None:
        """In tokens' worth of K and V, at 1,000 tokens: 63 pages, the last of 8 tokens."""
        kept = 512 - 8
        assert parse("delta").select_tokens(1000) == 1000
        assert parse("quest:budget=512").select_tokens(1000) == kept + 63
        assert parse("tokenselect:budget=512").select_tokens(1000) == kept + 500
        assert parse("refreshkv:budget=512,stride=10").select_tokens(1000) == kept + 50
        assert parse("streaming:window=496").select_tokens(1000) == kept

    def test_evicting_methods_have_nothing_to_reuse(self) -> None:
        assert str(parse("h2o").layer_plan(4)) == "SSSS"
        assert str(parse("h2o:plan=FSSS").layer_plan(4)) == "FSSS"
        with pytest.raises(deltakv.PlanError, match="'h2o' evicts in each layer by itself, and layer 2 is REUSE"):
            parse("h2o:plan=FSRS").layer_plan(4)

    @pytest.mark.parametrize("name", sorted(REGISTRY))
    def test_windows_need_a_budget(self, name: str) -> None:
        """Which methods may have WINDOW layers, and what is said where they may not."""
        if name == "full":
            return  # takes no plan
        said = {
            "streaming": "'streaming' has no budget that a WINDOW layer could read, and layer 1 is one; allowed are F",
            "h2o": "'h2o' evicts in each layer by itself, and layer 1 is WINDOW; make it 'S'",
            "a2sf": "'a2sf' evicts in each layer by itself, and layer 1 is WINDOW; make it 'S'",
            "lazyeviction": "'lazyeviction' evicts in each layer by itself, and layer 1 is WINDOW; make it 'S'",
        }
        method = parse(f"{name}:plan=FWS")
        if name in said:
            with pytest.raises(deltakv.PlanError, match=said[name]):
                method.layer_plan(3)
        else:
            assert str(method.layer_plan(3)) == "FWS"

    def test_from_options(self) -> None:
        assert from_options("delta", {"budget": 256, "recent": 32}) == deltakv.Delta(budget=256, recent=32)
        with pytest.raises(deltakv.ConfigError, match="algorithm"):
            from_options("delta", {"algorithm": "full"})
