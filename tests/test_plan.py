"""Layer plans: letters, layers, presets and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltakv
from deltakv.plan import PRESETS, LayerPlan, Role, all_full, paper, resolve


def test_letters() -> None:
    plan = LayerPlan.from_string("FFSRRRSR")
    assert plan.roles[:4] == (Role.FULL, Role.FULL, Role.SELECT, Role.REUSE)
    assert str(plan) == "FFSRRRSR"
    assert len(plan) == 8
    assert plan.layers(Role.FULL) == [0, 1]
    assert plan.layers(Role.SELECT) == [2, 6]
    assert plan.layers(Role.REUSE) == [3, 4, 5, 7]
    assert plan.reads_in_full == 4


@given(st.text(alphabet="FSRW", min_size=1, max_size=40))
def test_accepted_exactly_if_every_reuse_follows_a_select(letters: str) -> None:
    bad = "R" in letters and "S" not in letters[: letters.index("R")]
    try:
        plan = LayerPlan.from_string(letters)
    except deltakv.PlanError as error:
        assert bad
        assert f"layer {letters.index('R')} is REUSE" in str(error)
    else:
        assert not bad
        assert str(plan) == letters
        assert plan.reads_in_full == letters.count("F") + letters.count("S")
        by_layers = LayerPlan.from_layers(
            len(letters),
            full=plan.layers(Role.FULL),
            select=plan.layers(Role.SELECT),
            window=plan.layers(Role.WINDOW),
        )
        assert by_layers == plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerPlan.from_string(""), "at least one layer"),
        (lambda: LayerPlan(()), "at least one layer"),
        (lambda: LayerPlan.from_string("FFXSy"), r"the letters \['X', 'y'\]; allowed are F \(full\)"),
        (lambda: LayerPlan.from_string("ffs"), "the letters"),
        (lambda: LayerPlan.from_string("FR"), "layer 1 is REUSE, but no layer before it is SELECT"),
        (lambda: LayerPlan.from_string("WR"), "make layer 1 'F', 'S' or 'W', or put an 'S' before it"),
        (lambda: LayerPlan.from_layers(4, full=[0], select=[2]), "layer 1 is REUSE"),
        (lambda: LayerPlan.from_layers(4, full=[0, 1], select=[1, 2]), r"layers \[1\] are named as full and as select"),
        (lambda: LayerPlan.from_layers(4, full=[0], select=[1, 4]), r"names layers \[4\], but the model has 4 layers"),
        (lambda: LayerPlan.from_layers(4, select=[-1, 0]), r"names layers \[-1\]"),
        (lambda: LayerPlan.from_layers(4, select=[0], window=[4]), r"names layers \[4\]"),
        (lambda: LayerPlan.from_layers(4, select=[0, 1], window=[1, 2]), r"\[1\] are named as select and as window"),
    ],
    ids=range(12),
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(deltakv.PlanError, match=message):
        make()


def test_the_paper_s_plan() -> None:
    """28-layer Qwen models: layers 0, 1 FULL; 2, 14, 22 SELECT."""
    plan = paper(28)
    assert plan.layers(Role.FULL) == [0, 1]
    assert plan.layers(Role.SELECT) == [2, 14, 22]
    assert plan.reads_in_full == 5


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_fit_every_depth(name: str) -> None:
    for depth in range(1, 130):
        plan = resolve(name, depth)
        assert len(plan) == depth
        assert plan.reads_in_full <= depth
        if name == "paper" and depth >= 6:
            assert plan.reads_in_full == 5
            assert plan.layers(Role.REUSE)


def test_resolve() -> None:
    assert resolve(None, 28) == resolve("paper", 28) == paper(28)
    assert resolve("full", 3) == all_full(3)
    plan = LayerPlan.from_string("SRR")
    assert resolve(plan, 3) is plan
    assert resolve("SRR", 3) == plan


@pytest.mark.parametrize("spec", ["SRR", LayerPlan.from_string("SRR")], ids=["letters", "plan"])
def test_another_depth(spec: Any) -> None:
    with pytest.raises(deltakv.PlanError, match="the plan SRR is for 3 layers, but the model has 4 layers to plan"):
        resolve(spec, 4)


@pytest.mark.parametrize("spec", ["papers", "FFSX", "", "no/such/file"])
def test_neither_preset_nor_letters_nor_file(spec: str) -> None:
    with pytest.raises(deltakv.PlanError, match="is not a preset"):
        resolve(spec, 4)


class TestFiles:
    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        plan, path = LayerPlan.from_string("FSRRSR"), tmp_path / "plan.json"
        plan.save(path, model="tiny", tokens=512)
        assert json.loads(path.read_text()) == {"plan": "FSRRSR", "model": "tiny", "tokens": 512}
        assert LayerPlan.load(path) == plan
        assert resolve(path, 6) == resolve(str(path), 6) == plan
        with pytest.raises(deltakv.PlanError, match="is for 6 layers"):
            resolve(path, 7)

    def test_by_layers(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        path.write_text('{"depth": 28, "full": [0, 1], "select": [2, 14, 22]}')
        assert LayerPlan.load(path) == paper(28)
        path.write_text('{"depth": 3, "select": [0]}')
        assert str(LayerPlan.load(path)) == "SRR"
        path.write_text('{"depth": 6, "full": [3], "select": [2], "window": [0, 1, 4]}')
        assert str(LayerPlan.load(path)) == "WWSFWR"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"FSRR", "is not JSON"),
            (b"\xff\xfe", "is not JSON"),
            (b"[]", 'must hold {"plan"'),
            (b"{}", 'must hold {"plan"'),
            (b'"FSR"', 'must hold {"plan"'),
            (b'{"plan": 3}', 'must hold {"plan"'),
            (b'{"depth": 3}', 'must hold {"plan"'),
            (b'{"depth": 3, "select": 0}', 'must hold {"plan"'),
            (b'{"depth": 3, "window": [0, 1, 2]}', 'must hold {"plan"'),
            (b'{"depth": 3, "select": [], "window": 0}', 'must hold {"plan"'),
            (b'{"depth": 3, "select": ["0"]}', "must hold|names layers"),
            (b'{"depth": 3, "select": [3]}', "names layers"),
            (b'{"plan": "FRS"}', "layer 1 is REUSE"),
        ],
        ids=str,
    )
    def test_broken(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "plan.json"
        path.write_bytes(content)
        with pytest.raises(deltakv.PlanError, match=message):
            LayerPlan.load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(deltakv.PlanError, match=r"plan file .*nowhere\.json (does not exist|cannot be read)"):
            resolve(tmp_path / "nowhere.json", 4)
        with pytest.raises(deltakv.PlanError, match=r"nowhere\.json (does not exist|cannot be read)"):
            resolve("nowhere.json", 4)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(deltakv.PlanError, match=str(tmp_path)):
            resolve(tmp_path, 4)
        with pytest.raises(deltakv.PlanError, match=str(tmp_path)):
            resolve(str(tmp_path), 4)

    def test_a_file_named_like_a_plan(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Letters are letters, whatever lies in the current folder."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "SRR").write_text('{"plan": "FFF"}')
        assert str(resolve("SRR", 3)) == "SRR"
        assert str(resolve(Path("SRR"), 3)) == "FFF"

    @pytest.mark.parametrize("spec", [0, 3, b"SRR", ["S", "R", "R"]], ids=str)
    def test_something_else(self, spec: Any) -> None:
        """Not even a number that happens to be an open file's."""
        with pytest.raises(deltakv.PlanError, match="plan"):
            resolve(spec, 3)
