"""`deltakv calibrate` on a tiny model: what it finds, what it writes, what it refuses, and that nothing stops it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, refused
from crashes import killed

import deltakv
from deltakv.bench.layer_times import LayerTimes
from deltakv.errors import ConfigError, InputError, PlanError
from deltakv.evals import calibration
from deltakv.evals.plan_search import readers
from deltakv.evals.windows import measure_windows
from deltakv.methods import REGISTRY, parse
from deltakv.plan import LayerPlan, Role, model_fingerprint
from deltakv.plan import paper as paper_plan

command = import_module("deltakv.cli.calibrate")  # `deltakv.cli.app` has the function of that name

SMALL = (
    "--context", "300", "--budget", "64", "--reading", "3", "--windows", "1", "--positions", "32", "--quick", "8",
    "--confirm-positions", "64",
)  # fmt: skip


def calibrated(run: Run, folder: str, out: Path, *more: str) -> dict[str, Any]:
    result = run("calibrate", "--model", folder, "--out", str(out), *SMALL, *more)
    assert result.code == 0, result.err
    assert f"plan={out}" in result.out and "with 95%" in result.out
    assert result.out.count("calibrated: layer ") == 1 and result.out.count("the paper's plan: layer ") == 1
    data: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return data


def test_a_plan_is_found_confirmed_and_taken(run: Run, model_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    data = calibrated(run, model_folder, out)
    plan = LayerPlan.load(out)
    assert len(plan) == 6 and plan.reads_in_full == 3 and plan.made_for == data["made_for"]
    full, theirs, paper, ours = data["confirmed"]
    names = [one["method"] for one in data["confirmed"]]
    assert names == ["full", "the paper's settings", "the paper's plan", "calibrated"]
    assert full["kl_mean"] < 1e-9 and full["positions"] == ours["positions"] == 64
    assert 3 * 300 + 3 * 64 < ours["attended_tokens"] <= paper["attended_tokens"]  # three readers, for the paper's cost
    low, high = ours["kl_interval"]
    assert 0 < low <= ours["kl_mean"] <= high
    assert data["against_the_paper_s_plan"]["kl_share"] == pytest.approx(ours["kl_mean"] / paper["kl_mean"])
    assert data["against_the_paper_s_settings"]["kl_share"] == pytest.approx(ours["kl_mean"] / theirs["kl_mean"])
    assert theirs["kl_mean"] != paper["kl_mean"]
    assert data["new_pages"] == ours["new_pages"] and full["new_pages"] == {}
    assert [int(layer) for layer in data["new_pages"]] == plan.layers(Role.SELECT)
    assert all(0 < share < 1 for share in data["new_pages"].values())
    assert [int(layer) for layer in paper["new_pages"]] == paper_plan(6).layers(Role.SELECT)
    # Of all of three readers that were looked at for long, the one with the least loss is what was chosen.
    thorough = {
        key: loss
        for key, loss in data["tried"].items()
        if key.endswith(" thorough") and parse(key.split()[0]).layer_plan(6).reads_in_full == 3
    }
    assert min(thorough, key=lambda key: thorough[key]) == f"{data['method']} thorough"
    assert not out.with_name("plan.json.state").exists() and data["versions"] and data["texts"]
    method = f"delta:plan={out}"  # the file says the rest
    settings = data["settings"]
    taken = parse(method)
    assert (taken.budget, taken.recent, taken.sinks) == (settings["budget"], settings["recent"], settings["sinks"])
    assert taken == deltakv.from_plan(out) and parse(f"{method},budget=1024").budget == 1024
    assert f"budget={settings['budget']}" in data["method"]
    compared = run(
        "compare", "--model", model_folder, "--method", method, "--context", "300", "--positions", "20",
        "--steps", "0", "--no-memory",
    )  # fmt: skip
    assert compared.code == 0, compared.err


def test_all_numbers_of_reading_layers_cost_the_same(run: Run, model_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    small = [word for word in SMALL if word not in ("--reading", "3")]
    assert run("calibrate", "--model", model_folder, "--out", str(out), *small).code == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    thorough = [parse(key.split()[0]) for key in data["tried"] if key.endswith(" thorough")]
    readings = {method.layer_plan(6).reads_in_full: method.budget for method in thorough}
    known = paper_plan(6).reads_in_full
    assert len(readings) > 1
    for length in (236, 300):
        most = known * length + (6 - known) * 64
        assert all(n * length + (6 - n) * budget <= most for n, budget in readings.items())
    ours = data["confirmed"][-1]
    assert ours["attended_tokens"] <= data["confirmed"][1]["attended_tokens"]


#: Every other method, with what makes it show on so few positions.
OTHERS = {name: name for name in REGISTRY if name not in ("full", "delta")}
OTHERS |= {name: f"{name}:lag=4" for name, config in REGISTRY.items() if config.evicts}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_the_other_methods_are_calibrated_at_the_same_cost(
    run: Run, model_folder: str, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "plan.json"
    words = [*SMALL[:4], "--reading", "2", *SMALL[6:], "--method", OTHERS[name]]
    result = run("calibrate", "--model", model_folder, "--out", str(out), *words)
    assert result.code == 0, result.err
    assert f"use it: --method {name}:plan={out}" in result.out
    data = json.loads(out.read_text(encoding="utf-8"))
    plan, found = LayerPlan.load(out), parse(f"{name}:plan={out}")
    assert found == deltakv.from_plan(out) and data["settings"]["algorithm"] == name
    assert found == replace(parse(data["method"]), plan=found.plan), "the file holds all that was found"
    rows = {row["method"]: row["attended_tokens"] for row in data["confirmed"]}
    assert list(rows) == ["full", f"{name}'s own plan", "the paper's settings", "the paper's plan", "calibrated"]
    assert rows["calibrated"] <= rows["the paper's plan"] < rows["full"]
    assert ("4 positions of each piece" in result.out) == found.evicts
    assert f"KL is {data['against_its_own_plan']['kl_share']:.0%} of that of {name}'s own plan" in result.out
    own_picks = found.attends_to_own_pick
    assert len(readers(plan, own_picks)) == 2 and (not own_picks or set(str(plan)) == {"F", "S"})
    # Of all of two readers that were looked at for long, the best.
    tried = {
        key.split()[0]: loss
        for key, loss in data["tried"].items()
        if key.endswith(" thorough") and len(readers(parse(key.split()[0]).layer_plan(6), own_picks)) == 2
    }
    assert min(tried, key=lambda key: tried[key]) == data["method"] and parse(data["method"]).plan == str(plan)
    if name == "indexcache":  # its own search, from every layer on
        assert [parse(key.split()[0]).plan for key in data["tried"]][:3] == ["SRSSSS", "SSRSSS", "SSSRSS"]


@pytest.mark.parametrize("method", ["delta:page_size=32,sinks=32", "quest:page_size=32,recent=32"])
def test_pages_of_another_size(run: Run, model_folder: str, tmp_path: Path, method: str) -> None:
    out = tmp_path / "plan.json"
    words = [*SMALL[:2], "--budget", "96", "--reading", "2", *SMALL[6:], "--method", method]
    result = run("calibrate", "--model", model_folder, "--out", str(out), *words)
    assert result.code == 0, result.err
    assert deltakv.from_plan(out).page_size == 32
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["confirmed"][0]["kl_mean"] < 1e-9 and data["confirmed"][-1]["kl_mean"] > 0


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = LayerPlan.from_string("FSRRSR")
    for settings, said in (([1], "must be an object"), ({"budget": [1]}, "must be an object")):
        plan.save(path, settings=settings)
        with pytest.raises(PlanError, match=said):
            parse(f"delta:plan={path}")
    plan.save(path, settings={"algorithm": "delta", "window": 3})
    with pytest.raises(ConfigError, match="has no option 'window'"):
        parse(f"delta:plan={path}")
    with pytest.raises(PlanError, match=r"calibrated for 'delta', and this is 'quest'.*give the plan's letters"):
        parse(f"quest:plan={path}")


def test_a_plan_for_another_kind_of_model_is_refused(
    run: Run, model_folder: str, tmp_path: Path, tiny_model: Any
) -> None:
    path = tmp_path / "plan.json"
    LayerPlan.from_string("FSRRSR").save(path, made_for="llama, num_hidden_layers=6, hidden_size=4096")
    refused(
        run("generate", "hello", "--model", model_folder, "--method", f"delta:plan={path}"),
        "another kind of model", "hidden_size=4096", "deltakv calibrate",
    )  # fmt: skip
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="another kind of model"):
        deltakv.apply(model, deltakv.Delta(plan=path))
    assert model.config._attn_implementation == "sdpa"
    LayerPlan.from_string("FSRRSR").save(path, made_for=model_fingerprint(model.config))
    deltakv.apply(model, deltakv.Delta(plan=path)).remove()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--context", "60"], ["--context 60", "64"]),
        (["--budget", "400"], ["budget", "300"]),
        (["--budget", "100"], ["multiple of the page size"]),
        (["--cost", "bytes"], ["--cost 'bytes'", "tokens, time"]),
        (["--batch", "4"], ["--batch 4", "--cost time"]),
        (["--reading", "6"], ["--reading 6", "at most 5"]),
        (["--context", "100000"], ["100,001"]),
        (["--text", "/nowhere/text"], ["/nowhere/text"]),
        (["--out", "/nowhere/plan.json"], ["/nowhere/plan.json"]),
        (["--model", "nothing-of-the-kind"], ["nothing-of-the-kind"]),
        (["--method", "nothing"], ["unknown method 'nothing'"]),
        (["--method", "full"], ["'full'", "leaves nothing out"]),
        (["--method", "quest:budget=64"], ["budget", "--budget sets"]),
        (["--method", "streaming:window=64"], ["window", "--budget sets"]),
        (["--method", "delta:plan=quest"], ["says plan", "leave it out"]),
        (["--method", "quest:sinks=48"], ["--budget 64 leaves no room", "sinks of quest"]),
        (["--method", "quest:min_context=0"], ["says min_context", "leave it out"]),
        (["--method", "quest:sinks=16", "--sinks", "16"], ["--sinks 16", "both say sinks"]),
        (["--method", "lessismore", "--cost", "time"], ["--cost time", "lessismore", "--cost tokens"]),
        (["--method", "h2o"], ["8 positions are over", "lag=16", "smaller lag"]),
        (["--method", "h2o:lag=32", "--quick", "40"], ["32 positions are over", "lag=32"]),
        (["--method", "delta:page_size=32"], ["sinks=16 is not a multiple of the page size 32"]),
    ],
)
def test_refusals(run: Run, model_folder: str, tmp_path: Path, words: list[str], said: list[str]) -> None:
    options = ["--model", model_folder, "--out", str(tmp_path / "plan.json"), *SMALL]
    refused(run("calibrate", *options, *words), *said)
    assert not list(tmp_path.iterdir())


def test_a_method_that_looks_at_too_much(run: Run, model_folder: str, tmp_path: Path) -> None:
    """Full attention in every step costs more than the five layers that the paper's plan reads of these six."""
    words = [word for word in SMALL if word not in ("--reading", "3")]
    options = ["--model", model_folder, "--out", str(tmp_path / "plan.json"), *words, "--method", "refreshkv:stride=1"]
    refused(run("calibrate", *options), "at the cost of the paper's plan", "larger --budget")
    assert not list(tmp_path.iterdir())


def test_what_is_too_short_or_of_another_run(run: Run, model_folder: str, tmp_path: Path) -> None:
    out, state, text = tmp_path / "plan.json", tmp_path / "plan.json.state", tmp_path / "text"
    words = ("calibrate", "--model", model_folder, "--out", str(out), *SMALL)
    text.write_text("a few words " * 30, encoding="utf-8")
    refused(run(*words, "--text", str(text)), "to confirm on", "longer text")
    state.write_text("{}", encoding="utf-8")
    refused(run(*words), "is not the state of a calibration", str(state))
    state.write_text(json.dumps({"header": {"model": "other"}, "times": None, "losses": {}}), encoding="utf-8")
    refused(run(*words), "another model, text or options", str(state))


def fake_times(select: float) -> LayerTimes:
    """A device on which a SELECT layer takes so many times what a FULL one does, and a small pick next to nothing."""
    full = {236: 2.0, 300: 3.0}
    return LayerTimes.of(full, {at: select * ms for at, ms in full.items()}, {32: 0.1, 128: 0.4, 208: 1.9, 224: 2.2})


def test_at_the_cost_of_time(run: Run, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No candidate takes longer than the paper's plan by the times; they stand in the plan file and the table."""
    monkeypatch.setattr(command, "_layer_times", lambda *_: fake_times(1.5))
    out = tmp_path / "plan.json"
    words = [word for word in SMALL if word not in ("--reading", "3")]
    result = run("calibrate", "--model", model_folder, "--out", str(out), *words, "--cost", "time", "--batch", "4")
    assert result.code == 0, result.err
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["cost"] == "time" and data["batch"] == 4
    times = LayerTimes.load(data["times"])
    assert times == fake_times(1.5)

    def milliseconds(method: Any, length: int) -> float:
        plan = method.layer_plan(6)
        return times.step(
            *(len(plan.layers(role)) for role in (Role.FULL, Role.SELECT, Role.REUSE)), length, method.budget
        )

    for length in (236, 300):
        most = times.step(2, 3, 1, length, 64)
        tried = [parse(key.split()[0]) for key in data["tried"]]
        within = [method for method in tried if method.layer_plan(6).reads_in_full >= 3]
        assert within and all(milliseconds(method, length) <= most for method in within)
    assert len({method.budget for method in within if method.layer_plan(6).reads_in_full == 4}) > 1, "F is not S"
    full, theirs, paper, ours = (one["attention_ms"] for one in data["confirmed"])
    assert full == 6 * 3.0 and ours <= theirs == paper == pytest.approx(times.step(2, 3, 1, 300, 64))
    assert f"{paper:.2f} ms" in result.out


def test_times_are_measured_once(run: Run, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock never says the same twice: a search that goes on keeps what it said first, and ends as it would have."""

    def search(folder: str, select: float, stop_after: int | None = None) -> Any:
        monkeypatch.setattr(command, "_layer_times", lambda *_: fake_times(select))
        left = iter(range(stop_after)) if stop_after is not None else itertools.count()

        def measure(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise InputError("stopped here")
            return measure_windows(*arguments, **options)

        monkeypatch.setattr(calibration, "measure_windows", measure)
        (tmp_path / folder).mkdir(exist_ok=True)
        out = tmp_path / folder / "plan.json"
        words = ("calibrate", "--model", model_folder, "--out", str(out), *SMALL[:4], *SMALL[6:], "--cost", "time")
        result = run(*words)
        assert result.code == (0 if stop_after is None else 2), result.err
        return None if stop_after is not None else json.loads(out.read_text(encoding="utf-8"))

    whole, other = search("whole", 1.2), search("other", 1.9)
    assert search("cut", 1.2, 5) is None and search("cut", 1.9, 9) is None
    cut = search("cut", 1.9)
    assert whole["tried"].keys() != other["tried"].keys()
    for same in ("plan", "method", "settings", "times", "confirmed", "tried"):
        assert cut[same] == whole[same], same


@pytest.mark.parametrize("reading", [(), ("--reading", "3")])
def test_where_reading_less_saves_no_time(
    run: Run, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: tuple[str, ...]
) -> None:
    flat = LayerTimes.of({236: 1.0, 300: 1.0}, {236: 1.0, 300: 1.0}, {32: 1.0, 224: 1.0})
    monkeypatch.setattr(command, "_layer_times", lambda *_: flat)
    words = ("--out", str(tmp_path / "plan.json"), *SMALL[:4], *SMALL[6:], *reading, "--cost", "time")
    refused(run("calibrate", "--model", model_folder, *words), "reading less saves no time", "--cost tokens")
    assert not list(tmp_path.iterdir())


def test_killed_ten_times_it_ends_as_if_it_never_was(model_folder: str, tmp_path: Path) -> None:
    words = ["calibrate", "--model", model_folder, "--out", "{}/plan.json", *SMALL, "--threads", "1"]
    told = killed(tmp_path, words)
    whole, cut = (json.loads((tmp_path / name / "plan.json").read_text(encoding="utf-8")) for name in ("whole", "cut"))
    for same in ("plan", "method", "made_for", "texts", "settings", "confirmed", "against_the_paper_s_plan"):
        assert cut[same] == whole[same], (same, told)
    assert cut["tried"].keys() == whole["tried"].keys(), told
    assert cut["tried"] == pytest.approx(whole["tried"], rel=1e-6), told
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["plan.json"], told
