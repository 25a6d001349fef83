"""The profile of a model on this machine: measured once, then kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.recompute import recompute_of, why_not
from deltakv.integrations.hf.shapes import layer_shape
from deltakv.offload.profile import Profile, profile_path
from deltakv.offload.profiler import machine_name, measure


def known_or_measured(model: Any) -> Profile:
    """The profile in the cache folder, or a new one, which takes seconds on a GPU. Raises `InputError` for a broken
    file, `OffloadError`."""
    path = profile_path(machine_name(model.device), _describe(model))
    if path.exists():
        return Profile.load(path)
    profile = measure_model(model)
    profile.save(path)
    return profile


def measure_model(model: Any, **sizes: Any) -> Profile:
    """Measures the first layer of a model to which nothing is applied. sizes: as for `measure`."""
    config, shape = model.config, layer_shape(model.config, model.dtype)
    recompute, rest = recompute_of(model, 0), _decode_step(model)
    return measure(shape, model.dtype, model.device, config.num_attention_heads, recompute, rest, **sizes)


def one_layer(config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model of that config with one layer and random weights, to measure. Raises `UnsupportedUseError` for one whose
    K and V are never recomputed."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    config.vocab_size = min(config.vocab_size, 1024)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if obstacle := why_not(model):
        raise UnsupportedUseError(f"rates cannot be measured: {obstacle}")
    return model


def _decode_step(model: Any) -> Callable[[int], object]:
    """One token a row through the first layer, without any cache."""
    inner = model.get_decoder()
    rotary = getattr(inner, "rotary_emb", None)

    def step(rows: int) -> object:
        x = torch.zeros((rows, 1, model.config.hidden_size), dtype=model.dtype, device=model.device)
        where = torch.zeros((rows, 1), dtype=torch.long, device=model.device)
        options = {} if rotary is None else {"position_embeddings": rotary(x, where)}
        return inner.layers[0](x, attention_mask=None, position_ids=where, **options)

    return step


def _describe(model: Any) -> str:
    """All that a measurement depends on."""
    config = model.config
    names = ["model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += ["intermediate_size", "ffn_dim"]
    return ", ".join([f"{name}={getattr(config, name, None)}" for name in names] + [str(model.dtype)])
