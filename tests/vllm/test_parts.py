"""The plugin's parts on their own, where an engine would hide what they do."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from harness import ENVIRONMENT, SPARSE, Driver, EngineError, ask, prompt

from deltakv.config import Delta
from deltakv.errors import ConfigError, PlanError
from deltakv.integrations.vllm.plugin import register
from deltakv.integrations.vllm.settings import Settings, settings_of
from deltakv.integrations.vllm.versions import CHECKED_ON_GPU, advice, is_checked
from deltakv.methods import SoftmaxStats, from_plan, selector
from deltakv.plans import plan_files


@pytest.mark.parametrize("version", ["0.26.0", "0.26.1", "0.27.1", "0.27.1+cpu", "0.27.2.dev3", "0.32.0"])
def test_checked_versions(version: str) -> None:
    assert is_checked(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.27.0", "0.28.0", "0.33.0", "1.26.0", "dev", "0.26"])
def test_other_versions(version: str) -> None:
    assert not is_checked(version)
    assert version in advice(version) and "0.27.1" in advice(version)


def test_on_a_gpu_fewer_versions_are_checked() -> None:
    assert is_checked("0.26.0", CHECKED_ON_GPU) and is_checked("0.27.1", CHECKED_ON_GPU)
    assert not is_checked("0.32.0", CHECKED_ON_GPU)
    assert "vLLM 0.32.0 on a GPU" in advice("0.32.0", CHECKED_ON_GPU)


def test_a_vllm_that_has_moved_its_registry_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.40.0", "0.27.1"):
        other = ModuleType("vllm")
        other.__version__ = version  # type: ignore[attr-defined]
        for name in [name for name in sys.modules if name.startswith("vllm.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "vllm", other)
        if not is_checked(version):
            register()
            continue
        with pytest.raises(ImportError):
            register()


@pytest.mark.parametrize("asked", [None, {}, {"gdn_prefill_backend": "triton"}, object()])
def test_not_asked_for(asked: object) -> None:
    assert settings_of(asked) is None


def test_settings() -> None:
    assert settings_of({"deltakv": {}}) == Settings(Delta())
    asked = {"algorithm": "delta", "budget": 512, "plan": "FSRR", "tp_selection": "local"}
    assert settings_of({"deltakv": asked}) == Settings(Delta(budget=512, plan="FSRR"), "local")
    with pytest.raises(ConfigError, match="multiple"):
        settings_of({"deltakv": {"budget": 100}})


def test_a_plan_that_was_measured_for_the_served_model() -> None:
    asked = {"deltakv": {"plan": "measured"}}
    for kind, path in plan_files().items():
        assert settings_of(asked, lambda kind=kind: kind) == Settings(from_plan(path))
    with pytest.raises(PlanError, match="no plan was measured for this kind of model"):
        settings_of(asked, lambda: "llama, num_hidden_layers=1")


def test_the_entry_point_is_there_and_may_be_called_again() -> None:
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="deltakv")
    code = f"""
from {found.module} import {found.attr} as register
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
register(); register()
print(Backends.CPU_ATTN.get_class().__name__, Backends.CUSTOM.get_class().__name__, Backends.FLASH_ATTN.is_overridden())
"""
    assert python(code) == "SparseCPUBackend SparseCPUBackend False"


def test_on_another_version_stock_attention_runs_and_custom_is_refused(tiny: str) -> None:
    """Every process of vLLM sees the other version: the interpreter of the test's own driver is told so."""
    driver = Driver(VLLM_PLUGINS="", DELTAKV_TEST_VLLM_VERSION="0.31.0")
    try:
        assert driver.run(tiny, ask(prompt(20, 0), tokens=1), attention_backend=None)
        for engine in ({}, {"settings": SPARSE}, {"settings": SPARSE, "attention_backend": None}):
            with pytest.raises(EngineError, match=r"not checked on vLLM 0\.31\.0; checked are .* 0\.27\.1"):
                driver.run(tiny, ask(prompt(20, 0), tokens=1), **engine)
    finally:
        driver.close()


def test_ranks_that_agree_pick_as_one() -> None:
    """Heads spread over two ranks: with the largest token scores of both, each picks what all heads pick together."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((5, 1, 6, 320), generator=generator) * 4
    lens = torch.tensor([320, 300, 257, 100, 64], dtype=torch.int32)
    visible = torch.arange(320) < lens[:, None]
    lse = torch.logsumexp(logits[:, 0].masked_fill(~visible[:, None], float("-inf")), -1)
    delta = selector(Delta(budget=64, recent=16, sinks=16, min_context=64))

    def pick(heads: slice, across: object = None) -> torch.Tensor:
        peaks = torch.zeros((5, 1, logits[:, :, heads].shape[2]))
        return delta.pick(SoftmaxStats(logits[:, :, heads], peaks, lse[:, heads], lens, 16, across)).pages

    seen: list[torch.Tensor] = []
    for heads in (slice(0, 3), slice(3, 6)):
        pick(heads, lambda tokens, pages_of: seen.append(tokens) or pages_of(tokens))
    assert seen[0].shape == (5, 320)
    together = pick(slice(0, 6))
    for heads in (slice(0, 3), slice(3, 6)):
        assert torch.equal(pick(heads, lambda _, pages_of: pages_of(torch.maximum(*seen))), together)
        assert not torch.equal(pick(heads), together)


def test_keys_come_back_as_they_were_stored() -> None:
    code = """
import itertools, torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from deltakv.integrations.vllm.cpu_keys import places, row_keys
tried = 0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for size, dim in ((16, 64), (32, 64), (64, 128), (128, 80), (16, 96), (32, 256)):
        isa = _get_attn_isa(dtype, size, dim)
        cache = torch.full((7, 3, size, 2 * dim), float("nan"), dtype=dtype)
        keys, values = torch.randn(2, 3 * size - 5, 3, dim).to(dtype)
        pages = torch.tensor([5, 0, 3], dtype=torch.int32)
        slots = (pages[:, None] * size + torch.arange(size)).flatten()[: len(keys)].long()
        k_cache, v_cache = cache.view(7, 3, 2 * size, dim).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, k_cache, v_cache, slots, isa)
        assert torch.equal(row_keys(cache, pages, places(dtype, size, dim, isa))[: len(keys)], keys), (dtype, size, dim)
        tried += 1
print(tried)
"""
    assert python(code) == "18"


@pytest.mark.parametrize("part", ["loaded", "configured", "elsewhere"])
def test_layers_and_configs_that_are_not_covered(part: str) -> None:
    """Rows of the table in docs/vllm.md for which the CPU has no engine."""
    here = str(Path(__file__).parent)
    assert python(f"import sys; sys.path.insert(0, {here!r}); import loaded_layers as l; l.{part}()") == "as expected"


def python(code: str) -> str:
    """The last line that it prints in a process of its own: vLLM changes the one that imports it."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]
