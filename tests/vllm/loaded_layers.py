"""Layers as vLLM has loaded them, of which the config told another story: called by test_parts.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from deltakv.config import Delta
from deltakv.integrations.vllm import figures, support
from deltakv.integrations.vllm.layout import Layout
from deltakv.integrations.vllm.loaded import loaded_layout
from deltakv.integrations.vllm.settings import Settings
from deltakv.integrations.vllm.support import _check_engine, _check_model, _check_pages, _check_ranks


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
    assert "--ubatch-size" in said(lambda: _check_engine(engine(ubatch_size=2)))
    assert "--prefill-context-parallel-size 1" in said(lambda: _check_engine(engine(prefill_context_parallel_size=2)))
    print("as expected")


def elsewhere() -> None:
    """What a CPU's attention, and one rank on a CPU, do not come to."""

    def pages(page_size: int, block_size: int) -> None:
        narrow: Any = SimpleNamespace(supports_block_size=lambda size: size in (32, 64))
        config: Any = SimpleNamespace(cache_config=SimpleNamespace(block_size=block_size))
        _check_pages(config, Settings(Delta(page_size=page_size, sinks=page_size)), narrow)

    assert "page_size=16 is not a block size" in said(lambda: pages(16, 16))
    assert "allowed are 32, 64" in said(lambda: pages(16, 16)) and not said(lambda: pages(32, 32))

    def ranks(cuda: bool, off: bool, selection: str = "global", count: int = 2) -> str:
        support.current_platform = SimpleNamespace(is_cuda=lambda: cuda)
        support.envs = SimpleNamespace(VLLM_DISABLE_PYNCCL=off)
        config: Any = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=count))
        return said(lambda: _check_ranks(config, Settings(Delta(), selection)))

    assert "leave VLLM_DISABLE_PYNCCL unset" in ranks(cuda=True, off=True)
    allowed = [ranks(False, True), ranks(True, False), ranks(True, True, "local"), ranks(True, True, count=1)]
    assert not any(allowed)

    figures.get_tensor_model_parallel_rank = lambda: 0
    layout = Layout.of(Settings(Delta(plan="FSR")), Delta(plan="FSR").layer_plan(3), range(3))
    layout = layout.named({index: f"layer{index}" for index in range(3)})
    names = []
    for replica, rank, layers in ((0, 0, "layer0"), (0, 1, "layer0"), (1, 0, "layer0"), (1, 0, "layer2")):
        parallel: Any = SimpleNamespace(data_parallel_index=replica, rank=rank)
        counted = figures.figures_of(layout, [layers], parallel)
        assert counted is not None
        names.append(counted._worker)
    assert names == ["rank0", "rank1", "replica1-rank0", "replica1-rank0-layer2"]
    print("as expected")
