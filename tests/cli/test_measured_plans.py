"""Plans that the package brings: found by the kind of model, with their budget, and by nobody who did not ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, refused

import deltakv
from deltakv import plans
from deltakv.errors import PlanError
from deltakv.methods import from_options, parse
from deltakv.plan import LayerPlan, model_fingerprint, paper, resolve


@pytest.fixture
def brought(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, model_folder: str) -> Path:
    """The package brings a plan for the tests' model of 6 layers, and none else. Returns its file."""
    folder = tmp_path_factory.mktemp("plans")
    path = folder / "tiny.json"
    config = json.loads((Path(model_folder) / "config.json").read_text(encoding="utf-8"))
    confirmed = [{"kl_mean": 0.5}, {"kl_mean": 0.25}]
    LayerPlan.from_string("FSRRSR").save(
        path, made_for=_fingerprint(config), settings={"algorithm": "delta", "budget": 96, "recent": 32, "sinks": 16},
        confirmed=confirmed, context=300,
    )  # fmt: skip
    monkeypatch.setattr(plans, "FOLDER", folder)
    return path


def _fingerprint(config: dict[str, Any]) -> str:
    from transformers import AutoConfig

    return model_fingerprint(AutoConfig.for_model(**config))


def test_what_the_package_brings() -> None:
    brought = plans.plan_files()
    assert len(brought) == len(list(plans.FOLDER.glob("*.json"))) > 0, "one a kind of model"
    for kind, path in brought.items():
        data = json.loads(path.read_text(encoding="utf-8"))
        plan, method = LayerPlan.load(path), deltakv.from_plan(path)
        assert f"num_hidden_layers={len(plan)}," in kind and plan.made_for == kind
        assert {name: getattr(method, name) for name in data["settings"]} == data["settings"]
        names = [one["method"] for one in data["confirmed"]]
        assert names == ["full", "the paper's settings", "the paper's plan", "calibrated"]
        _, theirs, _, ours = data["confirmed"]
        assert ours["kl_mean"] < theirs["kl_mean"] and ours["attended_tokens"] <= theirs["attended_tokens"]
        assert data["new_pages"] and data["machine"] and data["versions"] and data["commit"] and data["command"]
        assert path.stat().st_size < 8000


def test_it_is_found_by_the_kind_of_model(brought: Path, tiny_model: Any) -> None:
    kind = next(iter(plans.plan_files()))
    method = parse("delta:plan=measured", lambda: kind)
    assert (method.budget, method.recent, method.plan) == (96, 32, str(brought))
    assert method == from_options("delta", {"plan": "measured"}, lambda: kind) == deltakv.from_plan(brought)
    assert parse("delta:plan=measured,budget=512", lambda: kind).budget == 512
    model = tiny_model("llama")
    with pytest.raises(PlanError, match=r"no plan was measured for this kind of model.*calibrate.*measured are tiny"):
        deltakv.from_plan("measured", model)
    LayerPlan.load(brought).save(brought, made_for=model_fingerprint(model.config), settings={"budget": 176})
    assert deltakv.from_plan("measured", model).budget == 176


def test_without_a_model_it_says_what_to_do(brought: Path) -> None:
    for call in (lambda: parse("delta:plan=measured"), lambda: deltakv.from_plan("measured")):
        with pytest.raises(PlanError, match=r"deltakv.from_plan\('measured', model\)"):
            call()
    # A config alone would take the letters and leave the budget that they were measured with.
    with pytest.raises(PlanError, match=r"deltakv.from_plan\('measured', model\)"):
        deltakv.Delta(plan="measured").layer_plan(6)


def test_nothing_takes_it_unasked(brought: Path) -> None:
    assert deltakv.Delta().layer_plan(6) == resolve(None, 6) == paper(6) != LayerPlan.load(brought)
    assert parse("delta", lambda: next(iter(plans.plan_files()))) == deltakv.Delta()


def test_the_command_line_takes_it(run: Run, model_folder: str, brought: Path, tmp_path: Path) -> None:
    plan = ("plan", "--model", model_folder, "--context", "400", "--json", str(tmp_path / "plan.json"), "--method")
    assert run(*plan, "delta:plan=measured").code == 0
    measured = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert run(*plan, f"delta:plan={brought}").code == 0
    by_file = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert measured["results"] == by_file["results"]
    brought.unlink()
    refused(run(*plan, "delta:plan=measured"), "no plan was measured for this kind of model", "deltakv calibrate")


def test_inspect_says_whether_there_is_one(run: Run, model_folder: str, brought: Path, tmp_path: Path) -> None:
    words = (
        "inspect", "--model", model_folder, "--context", "200", "--steps", "8", "--out", str(tmp_path / "picks.png"),
        "--method", "delta:budget=64,recent=16,min_context=0",
    )  # fmt: skip
    out = run(*words).out
    assert "--method delta:plan=measured (KL 0.2500 against 0.5000 of the paper's plan, after 300 tokens)" in out
    brought.unlink()
    assert f"no plan was measured for this kind of model: deltakv calibrate --model {model_folder}" in run(*words).out
