"""The layers that vLLM has loaded, held against what the model's config said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import AttentionSpec

from deltakv.errors import UnsupportedModelError, UnsupportedUseError
from deltakv.integrations.vllm.layout import Layout, NamedLayout


def loaded_layout(
    layout: Layout, config: VllmConfig, kv_cache_spec: AttentionSpec, layer_names: Sequence[str]
) -> NamedLayout:
    """The layout by the names of this process's layers.

    layer_names: the layers that share a block table, and kv_cache_spec: how their KV cache is kept. Raises
    `DeltaKVError` subclasses if they are not what the config promised, or the mechanism does not cover them.
    """
    layers: dict[str, Any] = config.compilation_config.static_forward_context
    names: dict[int, str] = {}
    for name, layer in layers.items():
        if not isinstance(layer, Attention):
            continue
        index = extract_layer_index(name)
        if index in names:
            raise UnsupportedModelError(f"layer {index} has two attentions, {names[index]} and {name}; one is covered")
        names[index] = name
    for index, name in names.items():
        if name in layer_names:
            _check_layer(layout, index, name, layers[name])
    page_size = layout.settings.method.page_size
    planned = {index: name for index, name in names.items() if index in layout.roles}
    if any(name in layer_names for name in planned.values()) and kv_cache_spec.block_size != page_size:
        raise UnsupportedUseError(
            f"vLLM keeps the KV cache of {layer_names[0]} in blocks of {kv_cache_spec.block_size} tokens, whatever "
            f"--block-size says, and page_size={page_size}; a page has to be a block"
        )
    return layout.named(planned)


def _check_layer(layout: Layout, index: int, name: str, layer: Any) -> None:
    if type(layer) is not Attention:
        raise UnsupportedModelError(f"layer {name} is a {type(layer).__name__}, and only ordinary attention is covered")
    if (layer.sliding_window is None) != (index in layout.roles):
        has = "none" if layer.sliding_window is None else f"one of {layer.sliding_window} tokens"
        raise UnsupportedModelError(
            f"the model's config does not tell which layers have a sliding window: vLLM gives {name} {has}"
        )
    if layer.kv_sharing_target_layer_name is not None:
        raise UnsupportedModelError(
            f"layer {name} reads the KV cache of {layer.kv_sharing_target_layer_name}; models whose layers share one "
            "are not covered"
        )
    if index not in layout.roles:
        return
    if layer.impl.alibi_slopes is not None:
        raise UnsupportedModelError(f"layer {name} has ALiBi biases, which are not covered")
    if layer.impl.logits_soft_cap:
        raise UnsupportedModelError(f"layer {name} soft-caps its logits, which changes the softmax pages are scored by")
    if not layer.kv_cache_torch_dtype.is_floating_point or layer.kv_cache_torch_dtype.itemsize < 2:
        raise UnsupportedUseError(
            f"layer {name} keeps its KV cache as {layer.kv_cache_dtype}, because the checkpoint asks for it; give "
            "--kv-cache-dtype bfloat16 or float16"
        )
