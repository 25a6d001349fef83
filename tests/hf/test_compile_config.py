"""How `generate` compiles a decode step on a GPU: with deltakv's options, unless the user has chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

import deltakv
from deltakv.integrations.hf.generation import COMPILE_OPTIONS

CUDA = torch.device("cuda")


@pytest.fixture
def asked(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with a method applied that says it is on a device, and what `torch.compile` is asked for."""
    model = tiny_model("llama")
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or function)

    def ask(device: torch.device, config: CompileConfig | None) -> list[dict[str, Any]]:
        with deltakv.apply(model, deltakv.Delta()), pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "device", device)
            for _ in range(2):  # the second is served by the first
                model.get_compiled_call(config)
        return calls

    return ask


@pytest.mark.parametrize("config", [None, CompileConfig(), CompileConfig(fullgraph=True)])
def test_a_gpu_gets_them(asked: Any, config: CompileConfig | None) -> None:
    before = None if config is None else config.to_dict()
    (call,) = asked(CUDA, config)
    assert call["mode"] is None and call["options"] == COMPILE_OPTIONS
    assert call["fullgraph"] == (config is not None and config.fullgraph)
    assert config is None or config.to_dict() == before


@pytest.mark.parametrize(
    "config",
    [
        CompileConfig(mode="max-autotune"),
        CompileConfig(mode=None, options={"triton.cudagraphs": False}),
        CompileConfig(backend="eager"),
    ],
)
def test_what_the_user_chose_stands(asked: Any, config: CompileConfig) -> None:
    assert asked(CUDA, config) == [config.to_dict()]


def test_other_devices_are_left_alone(asked: Any) -> None:
    assert asked(torch.device("cpu"), None) == [CompileConfig().to_dict()]


def test_torch_compile_knows_them() -> None:
    options = torch._inductor.list_options()
    assert set(COMPILE_OPTIONS) <= set(options)
    usual = torch._inductor.list_mode_options("reduce-overhead")
    assert usual.items() <= COMPILE_OPTIONS.items()
