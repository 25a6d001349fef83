"""What offloading needs to know of a model's layers, read from its config."""

from __future__ import annotations

from typing import Any

import torch

from deltakv.offload.codecs import InputCodec, codec
from deltakv.offload.scheduler import LayerShape


def layer_shape(config: Any, dtype: torch.dtype, bits: int = 16) -> LayerShape:
    """The shape of a layer, with the bytes that are stored of a token: the position beside X, scales beside K and V.

    bits: as in `Host`. Raises `ConfigError` for heads that cannot be stored so.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LayerShape(
        hidden=config.hidden_size,
        kv_heads=kv_heads,
        head_dim=head_dim,
        element_bytes=dtype.itemsize,
        x_bytes=InputCodec(config.hidden_size, dtype).record,
        kv_bytes=codec(kv_heads, head_dim, dtype, bits).record,
    )


def layer_weights(config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a layer's weights: those that make K and V, and all others; biases and norms among them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).get_decoder().layers[0]
    shape = layer_shape(config, dtype)
    first = 2 * shape.hidden * shape.kv_width
    return first * dtype.itemsize, (sum(weight.numel() for weight in layer.parameters()) - first) * dtype.itemsize
