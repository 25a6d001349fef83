"""Models by their dimensions alone, with random weights, made where they are needed.

Speed does not depend on what the numbers say, as long as they are no zeros; so any configuration can be measured
without its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deltakv.errors import InputError
from deltakv.integrations.hf.support import model_shape


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _opt(hidden: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "max_position_embeddings": 2048,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "dropout": 0.0,
    }


_QWEN2 = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "max_position_embeddings": 131072,
    "rope_parameters": _rope(1e4),
}

#: Dimensions by name, as the models' own configurations give them.
DIMS: dict[str, dict[str, Any]] = {
    "r1-distill-qwen-1.5b": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "r1-distill-qwen-7b": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": _rope(1e6),
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": _rope(1e4),
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
        "rope_parameters": _rope(5e5),
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "max_position_embeddings": 40960,
        "rope_parameters": _rope(1e6),
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "tiny": _opt(64, 4, 4),  # for a look at the machinery
}


def find_config(name: str) -> Any:
    """A text model's config by a name in `DIMS`, a JSON file of one, or whatever `--model` takes elsewhere.

    Raises `InputError` or `UnsupportedModelError`.
    """
    from deltakv import loading

    if name in DIMS:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**DIMS[name])
    elif name.endswith(".json"):
        if not Path(name).is_file():
            raise InputError(f"the config {name} does not exist")
        config = loading.load_config(name)
    else:
        try:
            config = loading.load_config(loading.locate(name))
        except InputError as error:
            raise InputError(f"{error}; or one of the dimensions {', '.join(DIMS)}") from None
    config = config.get_text_config()
    model_shape(config)
    return config


def resized(config: Any, longest: int, layers: int | None = None) -> Any:
    """The config with positions for `longest` tokens, which random weights do not mind. layers: fewer, or None."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < longest:
        config.max_position_embeddings = longest
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def make_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of that config in eval mode; its weights are drawn, the same ones every time."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
