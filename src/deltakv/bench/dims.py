"""Models by their dimensions alone: what speed and memory depend on, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltakv.errors import InputError


def _opt(hidden: int, heads: int, layers: int) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden, vocab_size=50272, dropout=0.0,
    )  # fmt: skip


def _llama_2_7b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=32,
        intermediate_size=11008, vocab_size=32000,
    )  # fmt: skip


def _qwen_2_5_7b() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=28,
        intermediate_size=18944, vocab_size=152064,
    )  # fmt: skip


#: Public models by name; "tiny" is for a look at the machinery.
DIMS: dict[str, Callable[[], Any]] = {
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "opt-13b": lambda: _opt(5120, 40, 40),
    "llama-2-7b": _llama_2_7b,
    "qwen2.5-7b": _qwen_2_5_7b,
    "tiny": lambda: _opt(64, 4, 4),
}


def dims(name: str, longest: int, layers: int | None = None) -> Any:
    """The config of that name, its positions extended to `longest` tokens. layers: fewer, for a smaller machine.

    Raises `InputError` for an unknown name.
    """
    if name not in DIMS:
        raise InputError(f"no dimensions are known for {name!r}; allowed are {', '.join(DIMS)}")
    config = DIMS[name]()
    config.max_position_embeddings = max(config.max_position_embeddings, longest)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def random_model(config: Any, dtype: Any, device: Any) -> Any:
    """A model of that config in eval mode; its weights are drawn, the same ones every time."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
