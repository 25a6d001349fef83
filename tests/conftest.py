"""Fixtures for all tests: memory that is poisoned until written, and tiny models of every architecture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its own library is compiled on import

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # names that are no model are refused at once, not after retries

#: Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine cost ten times the
#: work. Tests that ask about threads set their own number.
torch.set_num_threads(1)

#: `with torch.device(...)` notes once which functions make tensors: it must see torch's own, not the poisoned ones.
_device_constructors()


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN for floating types and the largest number for integers: memory that nobody may rely on."""
    with torch.no_grad():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes Python's `torch.empty`, `empty_like`, `empty_strided` and `Tensor.new_empty` return poison.

    Fresh memory happens to be zero often enough to hide a read before a write. Allocations inside torch's C++
    are not touched.
    """

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            return _poison(make(*args, **kwargs))

        return make_poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


def _config(kind: str) -> Any:
    """A configuration of 6 to 8 layers, with 4 query heads of size 16 and, where there is GQA, 2 KV heads."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gqa: dict[str, Any] = {
        **common,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "initializer_range": 0.14,
        "num_hidden_layers": 6,
    }
    if kind == "llama":
        return hf.LlamaConfig(**gqa, head_dim=16)
    if kind == "llama_mha":  # Llama 2: as many KV heads as query heads
        return hf.LlamaConfig(**{**gqa, "num_key_value_heads": 4}, head_dim=16)
    if kind == "qwen2":
        return hf.Qwen2Config(**gqa)
    if kind == "qwen3":
        return hf.Qwen3Config(**gqa, head_dim=16)
    if kind == "mistral":
        return hf.MistralConfig(**gqa, head_dim=16, sliding_window=None)
    if kind == "phi3":
        return hf.Phi3Config(**gqa, sliding_window=None, original_max_position_embeddings=4096)
    if kind == "opt":
        return hf.OPTConfig(
            **common, num_hidden_layers=6, ffn_dim=96, word_embed_proj_dim=64, init_std=0.14, dropout=0.0
        )
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "full_attention", "full_attention"] * 2
        return hf.Gemma3TextConfig(
            **{**gqa, "num_hidden_layers": 8},
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=32,
            layer_types=layers,
        )
    if kind == "gpt_oss":
        return hf.GptOssConfig(
            **{**gqa, "num_hidden_layers": 8},
            head_dim=16,
            sliding_window=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"] * 4,
        )
    raise ValueError(f"no tiny model of the kind {kind!r}")


#: The kinds that `tiny_model` makes.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "opt", "gemma3", "gpt_oss", "llama_mha")


def build_tiny_model(kind: str, seed: int = 0) -> Any:
    """A random float32 model in eval mode with peaked attention, so that a wrong pick shows in the logits."""
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * KINDS.index(kind) + seed)
        model = hf.AutoModelForCausalLM.from_config(_config(kind), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("sinks"):
                    parameter.normal_(mean=1.0)
                elif name.endswith("q_norm.weight"):  # QK-norm would leave logits of unit size: flat attention
                    parameter.add_(1.0)
                elif name.endswith("bias"):  # biases start at zero: give them something to get wrong
                    parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """The factory `tiny_model(kind, seed=0)`: see `build_tiny_model`; `kind` is one of `KINDS`."""
    return build_tiny_model
