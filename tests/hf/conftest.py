"""Fixtures of the transformers integration: shared tiny models, checked to be left as they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import deltakv
from hf.harness import ragged
from hf.on_device import COVERING, Talk

_models: dict[tuple[str, int], Any] = {}


def fingerprint(model: Any) -> dict[str, Any]:
    """What `apply` may touch, in comparable form."""
    return {
        "implementation": model.config._attn_implementation,
        "attributes": sorted(model.__dict__),
        "hooks": {
            name: [len(getattr(module, hooks)) for hooks in ("_forward_pre_hooks", "_forward_hooks")]
            for name, module in model.named_modules()
        },
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        "mask functions": sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys()),
    }


@pytest.fixture
def model_of(tiny_model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`model_of(kind, seed=0)`: one model a kind and seed for all tests, which must not change its weights.

    Fails a test that leaves a trace of deltakv on one.
    """
    used: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = {}

    def get(kind: str, seed: int = 0) -> Any:
        key = (kind, seed)
        if key not in _models:
            _models[key] = tiny_model(kind, seed)
            # No test wants to end early by chance; those about ending say so.
            _models[key].generation_config.eos_token_id = None
        if key not in used:
            used[key] = (_models[key], fingerprint(_models[key]))
        return _models[key]

    yield get
    for key, (model, before) in used.items():
        left = fingerprint(model)
        if left != before:
            del _models[key]
        assert left == before, f"the test left traces on the shared model {key}"


@pytest.fixture
def talk(model_of: Any, tiny_model: Any) -> Iterator[Callable[..., Talk]]:
    """`talk(*lengths, kind="llama", cache={})` begins one, under a budget that covers it; `cache`: of `new_cache`."""
    handles = []

    def begin(*rows: int, kind: str = "llama", cache: dict[str, Any] | None = None) -> Talk:
        handle = deltakv.apply(model_of(kind), COVERING)
        handles.append(handle)
        return Talk(model_of(kind), tiny_model(kind), handle, ragged(*rows), handle.new_cache(**cache or {}))

    with torch.no_grad():
        yield begin
    for handle in handles:
        handle.remove()
