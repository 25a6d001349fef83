"""K and V from a layer's input again, as the model's own attention module makes them."""

from __future__ import annotations

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.host_cache import HostCache
from deltakv.offload.layer import Recompute

#: Model types whose projections, biases, K-norm and RoPE are repeated here, and tested.
RECOMPUTABLE = ("llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
#: RoPE whose frequencies do not depend on how long a row is: what was rotated then is rotated alike now.
_STEADY_ROPE = ("default", "linear", "llama3", "yarn")


def why_not(model: Any) -> str:
    """Why K and V of this model cannot be made from X again, or "" if they can."""
    kind = model.config.model_type
    if kind not in RECOMPUTABLE:
        return f"recomputing K and V is covered for {', '.join(RECOMPUTABLE)}, not for {kind!r}"
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    rope = getattr(rotary, "rope_type", "default")
    if rope not in _STEADY_ROPE:
        return f"RoPE of the type {rope!r} rotates a token differently as its row grows, so K cannot be made again"
    if kind == "phi3" and any(type(module.qkv_proj) is not nn.Linear for module in attention_modules(model)):
        return "the joint projection of Q, K and V is no plain nn.Linear (an adapter, or quantised weights)"
    return ""


def attention_modules(model: Any) -> list[Any]:
    """The attention module of each layer."""
    return [layer.self_attn for layer in model.get_decoder().layers]


def recompute_of(model: Any, layer: int) -> Recompute:
    """From X and positions to K and V, for that layer. The model must be one that `why_not` has nothing against."""
    module, rotary = attention_modules(model)[layer], getattr(model.get_decoder(), "rotary_emb", None)

    def recompute(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        tokens, rows = positions.shape
        k, v = _project(module, x.flatten(0, 1))
        k, v = (y.view(tokens, rows, -1, module.head_dim) for y in (k, v))
        if hasattr(module, "k_norm"):
            k = module.k_norm(k)
        if rotary is not None:
            # The model's own function, with no query heads: tokens take the place of the batch, rows of the sequence.
            rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
            cos, sin = rotary(x, positions)
            heads = k.transpose(1, 2)
            k = rotate(heads[:, :0], heads, cos, sin)[1].transpose(1, 2)
        return k, v

    return recompute


def _project(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of each token of x, [tokens, hidden], side by side over heads."""
    if hasattr(module, "qkv_proj"):
        weight, bias = module.qkv_proj.weight, module.qkv_proj.bias
        width = module.num_key_value_heads * module.head_dim
        at = len(weight) - 2 * width  # behind Q
        kv = F.linear(x, weight[at:], None if bias is None else bias[at:])
        return kv[:, :width], kv[:, width:]
    return module.k_proj(x), module.v_proj(x)


def capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of an attention module: shows a cache in host memory what K and V will be made from."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, HostCache):
        return
    positions = kwargs.get("position_ids")
    if positions is None and kwargs.get("position_embeddings") is not None:
        raise UnsupportedUseError(
            "this version of transformers does not tell attention its position_ids, which K is made again from; "
            "use deltakv.Host(recompute=0)"
        )
    cache.take_input(module.layer_idx, kwargs["hidden_states"] if not args else args[0], positions)
