"""Which transformers models fit the mechanism, and what is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deltakv.errors import UnsupportedModelError

#: Model types (`config.model_type`) whose logits are tested against stock transformers.
SUPPORTED = (
    "gemma3_text",
    "gpt_oss",
    "llama",
    "mistral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
)


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a model, read from its config alone.

    windows: for each layer its sliding window in tokens, or None for a layer that attends to everything.
    """

    model_type: str
    windows: tuple[int | None, ...]

    @property
    def planned_layers(self) -> list[int]:
        """The layers that join the plan: those without a sliding window."""
        return [index for index, window in enumerate(self.windows) if window is None]


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT, `torch.compile` and data-parallel wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a transformers model; give a model that AutoModelForCausalLM loads"
            )
    return inner


def model_shape(config: Any) -> ModelShape:
    """Reads a config and refuses what is not covered. Raises `UnsupportedModelError` that names the mechanism."""
    name = config.model_type
    refused = f"model type {name!r} is not supported"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{refused}: it is an encoder-decoder, and only decoder-only models are covered")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{refused}: multi-head latent attention (MLA) keeps a compressed cache that page scores do not cover"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(
            f"{refused}: logit soft-capping (attn_logit_softcapping={config.attn_logit_softcapping}) "
            "changes the softmax that pages are scored by"
        )
    if getattr(config, "alibi", False) or name in ("bloom", "mpt"):
        raise UnsupportedModelError(f"{refused}: ALiBi biases are not covered")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise UnsupportedModelError(f"{refused}: its attention is bidirectional, and decoding needs a causal model")
    if name not in SUPPORTED:
        kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
        why = f": its layers include {', '.join(kinds)}" if kinds else ""
        raise UnsupportedModelError(f"{refused}{why}; covered and tested are {', '.join(SUPPORTED)}")
    windows = tuple(_window(config, index) for index in range(config.num_hidden_layers))
    if all(window is not None for window in windows):
        raise UnsupportedModelError(
            f"{refused} with this config: every layer has a sliding window ({windows[0]} tokens), "
            "so no layer is left for a plan"
        )
    return ModelShape(name, windows)


def _window(config: Any, layer: int) -> int | None:
    """The layer's sliding window, or None. A window that no context can outgrow counts as none."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    kind = kinds[layer] if kinds else ("full_attention" if window is None else "sliding_attention")
    if kind == "full_attention":
        return None
    if kind != "sliding_attention":
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is not supported: layer {layer} is {kind!r}; "
            "covered are full_attention and sliding_attention layers"
        )
    assert window is not None, "a sliding layer has a window"
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is not None and window >= limit else int(window)
