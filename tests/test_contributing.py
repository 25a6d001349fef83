"""The recipes of CONTRIBUTING.md, run as they are written."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import deltakv
from deltakv.methods import _SELECTORS, REGISTRY, parse

RECIPES = Path(__file__).parents[1] / "CONTRIBUTING.md"


def blocks(heading: str) -> str:
    """All Python of one section of the file, joined."""
    section = RECIPES.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))


def run(heading: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Executes a section's Python as a module of its own."""
    module = types.ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", module)
    exec(blocks(heading), module.__dict__)
    return module


@pytest.fixture
def window_method(monkeypatch: pytest.MonkeyPatch):
    """The method that the recipe adds, taken out again afterwards."""
    recipe = run("Add a method", monkeypatch)
    yield recipe.Window
    del REGISTRY["window"]
    del _SELECTORS[recipe.Window]


def test_add_a_method(window_method, tiny_model) -> None:
    model = tiny_model("llama")
    method = parse(f"window:window=32,sinks=16,plan=FS{'R' * (model.config.num_hidden_layers - 2)}")
    assert isinstance(method, window_method)
    ids = torch.randint(0, model.config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), deltakv.apply(model, method) as handle:
        cache = handle.new_cache()
        model(ids[:, :-1], past_key_values=cache)
        handle.stats.record_picks = True
        sparse = model(ids[:, -1:], past_key_values=cache).logits
    pages, n_kept = handle.stats.picks[0][2:]
    assert pages[0, : int(n_kept[0])].tolist() == [0, 11, 12]  # 200 tokens: page 12 holds the last 8
    with torch.no_grad():
        full = model(ids).logits[:, -1:]
    assert (sparse - full).abs().max() > 1e-3


def test_add_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    run("Add an op", monkeypatch)
    lengths = torch.tensor([1, 16, 17], dtype=torch.int32)
    assert torch.ops.deltakv.page_lengths(lengths, 16).tolist() == [1, 1, 2]
    torch.library.opcheck(torch.ops.deltakv.page_lengths.default, (lengths, 16))
