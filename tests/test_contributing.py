"""The recipes of CONTRIBUTING.md, run as they are written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import deltakv

SOURCE = Path(deltakv.__file__).parent
RECIPES = Path(__file__).parents[1] / "CONTRIBUTING.md"


def section(heading: str) -> str:
    return RECIPES.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]


def run(heading: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Executes a section's Python as a module of its own."""
    module = types.ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", module)
    exec("\n".join(re.findall(r"```python\n(.*?)```", section(heading), re.S)), module.__dict__)
    return module


@pytest.fixture
def with_window(tmp_path: Path) -> Path:
    """A copy of the sources to which the recipe was applied: each block in the file that its step names."""
    shutil.copytree(SOURCE, tmp_path / "deltakv", ignore=shutil.ignore_patterns("__pycache__"))
    steps = re.findall(r"`src/(deltakv/[\w/]+\.py)`.*?```python\n(.*?)```", section("Add a method"), re.S)
    assert [file for file, _ in steps] == [
        "deltakv/config.py",
        "deltakv/methods/window.py",
        "deltakv/methods/__init__.py",
    ]
    for file, block in steps:
        path = tmp_path / file
        path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + "\n\n" + block, encoding="utf-8")
    return tmp_path


def python(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_add_a_method(with_window: Path, tiny_model) -> None:
    model = tiny_model("llama")
    model.save_pretrained(with_window / "model")
    depth = model.config.num_hidden_layers
    code = f"""
import torch, transformers, deltakv
from deltakv.methods import parse
assert deltakv.__file__.startswith({str(with_window)!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(with_window / "model")!r}).eval()
method = parse("window:window=32,sinks=16,plan=FS{"R" * (depth - 2)}")
ids = torch.randint(0, model.config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
with torch.no_grad(), deltakv.apply(model, method) as handle:
    cache = handle.new_cache()
    model(ids[:, :-1], past_key_values=cache)
    handle.stats.record_picks = True
    sparse = model(ids[:, -1:], past_key_values=cache).logits
pages, n_kept = handle.stats.picks[0][2:]
with torch.no_grad():
    full = model(ids).logits[:, -1:]
print(pages[0, : int(n_kept[0])].tolist(), bool((sparse - full).abs().max() > 1e-3))
"""
    # 200 tokens: page 12 holds the last 8.
    assert python(with_window, "-c", code).split("\n")[0] == "[0, 11, 12] True"


def test_the_command_line_knows_an_added_method(with_window: Path, tiny_model) -> None:
    """Also `plan`, which predicts from the config alone: 3 pages, the last of them half full."""
    tiny_model("llama").save_pretrained(with_window / "model")
    json_file = with_window / "plan.json"
    method = "window:window=32,sinks=16,plan=FSRRRR"
    words = ("plan", "--model", str(with_window / "model"), "--method", method, "--context", "200")
    python(with_window, "-m", "deltakv", *words, "--json", str(json_file))
    (result,) = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    assert result["attended_tokens"] == 2 * 200 + 4 * 40


def test_add_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    run("Add an op", monkeypatch)
    lengths = torch.tensor([1, 16, 17], dtype=torch.int32)
    assert torch.ops.deltakv.page_lengths(lengths, 16).tolist() == [1, 1, 2]
    torch.library.opcheck(torch.ops.deltakv.page_lengths.default, (lengths, 16))
