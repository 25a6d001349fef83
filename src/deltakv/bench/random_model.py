"""Models with random weights and caches with random K and V, made where they are needed.

Speed does not depend on what the numbers say, as long as they are no zeros; so any configuration can be measured
without its weights, at any context without a prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltakv.errors import InputError
from deltakv.integrations.hf import PagedCache
from deltakv.integrations.hf.support import model_shape


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_QWEN2 = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "max_position_embeddings": 131072,
    "rope_parameters": _rope(1e4),
}


def _opt(hidden: int, heads: int, layers: int, vocabulary: int = 50272) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
        "vocab_size": vocabulary,
        "dropout": 0.0,
    }


#: Dimensions by name, as the models' own configurations give them; "tiny" is for a look at the machinery.
DIMS: dict[str, dict[str, Any]] = {
    "tiny": _opt(64, 4, 4),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
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
}


def find_config(name: str) -> Any:
    """A text model's config by a name in `DIMS`, a JSON file of one, or whatever `--model` takes elsewhere.

    Raises `InputError` or `UnsupportedModelError`.
    """
    from transformers import AutoConfig

    from deltakv import loading

    if name in DIMS:
        config = AutoConfig.for_model(**DIMS[name])
    elif name.endswith(".json"):
        if not Path(name).is_file():
            raise InputError(f"the config {name} does not exist")
        config = AutoConfig.from_pretrained(name)
    else:
        try:
            config = loading.load_config(loading.locate(name))
        except InputError as error:
            raise InputError(f"{error}; or one of the dimensions {', '.join(DIMS)}") from None
    config = config.get_text_config()
    model_shape(config)
    return config


def fewer_layers(config: Any, layers: int) -> None:
    """Makes it the config of a model of so many layers, for a smaller machine."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def make_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of that config with random weights, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def fill_paged(cache: PagedCache, model: Any, lengths: Sequence[int]) -> None:
    """Makes the cache hold a row of each length, with random K and V, and none of a prefill's work.

    Memory that the cache has already is not written again. Raises `InputError` for models with windowed layers.
    """
    cache.reset()
    heads, dim = kv_shape(model.config)
    width = max(lengths)
    columns = torch.arange(width)
    cache.begin(len(lengths), width, columns >= width - torch.tensor(lengths)[:, None])
    like = torch.empty((heads, 1, dim), dtype=model.dtype, device=model.device)
    pool = cache.state.pool
    for index, window in enumerate(cache.windows):
        if window is not None:
            raise InputError("random K and V need a model whose layers have no sliding window")
        if pool.k[index] is None:
            for tensor in pool.ensure_layer(index, like):
                tensor.normal_()
    cache.commit()


def make_static(model: Any, batch: int, max_length: int) -> Any:
    """transformers' own static cache, full of random K and V; each layer's `cumulative_length` says how much counts."""
    from transformers import StaticCache

    heads, dim = kv_shape(model.config)
    cache = StaticCache(config=model.config, max_cache_len=max_length)
    cache.early_initialization(batch, heads, dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads and head dim."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, dim
