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
