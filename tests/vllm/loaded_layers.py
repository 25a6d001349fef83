"""Layers as vLLM has loaded them, of which the config told another story: called by test_parts.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from deltakv.config import Delta
from deltakv.integrations.vllm.layout import Layout
from deltakv.integrations.vllm.loaded import loaded_layout
from deltakv.integrations.vllm.settings import Settings
from deltakv.integrations.vllm.support import _check_engine, _check_model


class OtherAttention(Attention):
    """One that does something else."""


def layer(kind: type = Attention, **changes: Any) -> Any:
    made = kind.__new__(kind)
    made.__dict__.update(
        sliding_window=None, kv_sharing_target_layer_name=None, kv_cache_torch_dtype=torch.bfloat16,
        kv_cache_dtype="auto", impl=SimpleNamespace(alibi_slopes=None, logits_soft_cap=0),
    )  # fmt: skip
    made.__dict__.update(changes)
    return made


def said(question: Any) -> str:
    try:
        question()
    except ValueError as error:
        return str(error)
    return ""


def load(block_size: int = 16, **changes: Any) -> None:
    settings = Settings(Delta(plan="FSR"))
    layers = {f"model.layers.{index}.attn": layer() for index in range(3)}
    layers |= {name.replace("__", "."): changed for name, changed in changes.items()}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    layout = Layout.of(settings, settings.method.layer_plan(3), range(3))
    loaded_layout(layout, config, SimpleNamespace(block_size=block_size), list(layers))


def loaded() -> None:
    last = "model__layers__2__attn"
    impl = SimpleNamespace(alibi_slopes=[1.0], logits_soft_cap=0)
    capped = SimpleNamespace(alibi_slopes=None, logits_soft_cap=30.0)
    for words, changes in (
        ("", {}),
        ("ALiBi", {last: layer(impl=impl)}),
        ("soft-caps its logits", {last: layer(impl=capped)}),
        ("reads the KV cache of model.layers.0", {last: layer(kv_sharing_target_layer_name="model.layers.0")}),
        ("does not tell which layers have a sliding window", {last: layer(sliding_window=64)}),
        ("is a OtherAttention", {last: layer(OtherAttention)}),
        ("layer 2 has two attentions", {"model__layers__2__cross": layer()}),
        ("keeps its KV cache as fp8", {last: layer(kv_cache_torch_dtype=torch.uint8, kv_cache_dtype="fp8")}),
        ("in blocks of 32 tokens", {"block_size": 32}),
    ):
        heard = said(lambda changes=changes: load(**changes))
        assert words in heard and bool(words) == bool(heard), (words, heard)
    print("as expected")


def configured() -> None:
    def model(**changes: Any) -> Any:
        text = SimpleNamespace(num_hidden_layers=2, layer_types=None)
        usual = {
            "hf_config": SimpleNamespace(model_type="t"), "hf_text_config": text, "runner_type": "generate",
            "use_mla": False, "is_encoder_decoder": False, "get_sliding_window": lambda: None,
            "disable_sliding_window": False,
        }  # fmt: skip
        return SimpleNamespace(**{**usual, **changes})

    def engine(**changes: Any) -> Any:
        usual = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_dbo": False}
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**{**usual, **changes}), speculative_config=None,
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )  # fmt: skip

    assert not said(lambda: _check_model(model())) and not said(lambda: _check_engine(engine()))
    assert "encoder-decoder" in said(lambda: _check_model(model(is_encoder_decoder=True)))
    assert "--enable-dbo" in said(lambda: _check_engine(engine(enable_dbo=True)))
    assert "--prefill-context-parallel-size 1" in said(lambda: _check_engine(engine(prefill_context_parallel_size=2)))
    print("as expected")
