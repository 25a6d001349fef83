"""A tiny model as a folder, and processes that run vLLM engines on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Driver

#: Layers of the tiny model.
DEPTH = 8


def save_tiny(folder: Path, kind: str = "Llama", **changes: Any) -> str:
    """A random model of 8 layers, 4 query and 2 KV heads of 32 (the least that vLLM's CPU attention takes), with peaked
    attention, so that a wrong pick shows."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{

                "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": DEPTH,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
                "initializer_range": 0.12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0
            ,
            **changes,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers of eight have a sliding window: vLLM keeps a block table for them, and three for the other six."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"] * (DEPTH // 4)
    return save_tiny(
        tmp_path_factory.mktemp("windowed"), "Gemma3Text", sliding_window=64, layer_types=kinds, query_pre_attn_scalar=4
    )


@pytest.fixture(scope="session")
def engines() -> Iterator[Driver]:
    """Engines of a vLLM that has deltakv beside it."""
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def stock() -> Iterator[Driver]:
    """Engines of a vLLM that loads no plugin."""
    driver = Driver(VLLM_PLUGINS="")
    yield driver
    driver.close()
