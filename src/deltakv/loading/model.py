"""Loading a located model with transformers, quietly, and its limits."""

from __future__ import annotations

import os
import warnings
from typing import Any

from deltakv.errors import InputError, UnsupportedModelError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def quiet() -> None:
    """Turns transformers' loading bars and advice off; a download from the Hub keeps its own bar."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"transformers|torch|huggingface_hub")
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_config(path: str) -> Any:
    """The model's config, and nothing else. Raises `InputError` or `UnsupportedModelError`."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, path)


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer, padding on the left as decoding needs. Raises `InputError`."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, path)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, dtype: str = "auto", device: str = "auto") -> Any:
    """The model in eval mode.

    dtype: one of `DTYPES`; `auto` is fp32 on CPU (fastest there, and exact), the model's own elsewhere.
    device: `auto` (a GPU if there is one), or what torch takes, such as `cpu` or `cuda:1`.
    Raises `InputError` or `UnsupportedModelError`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    where = find_device(device)
    if dtype == "auto" and where.type == "cpu":
        dtype = "float32"
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    return _from_pretrained(AutoModelForCausalLM, path, dtype=wanted).to(where).eval()


def find_device(device: str) -> Any:
    """The torch device; `auto` is a GPU if there is one. Raises `InputError` if it cannot be used."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        if where.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} cannot be used: {_one_line(error)}") from None
    return where


def length_limit(config: Any) -> int | None:
    """How many tokens the model's positions reach, or None if its config does not say."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(tokens: int, config: Any, what: str) -> None:
    """Raises `InputError` if `tokens` are more than the model's limit; `what` names them in the message."""
    limit = length_limit(config)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{what}: {tokens:,} tokens, but the model's limit is {limit:,}; shorten it by {tokens - limit:,}"
        )


def _from_pretrained(auto: Any, path: str, **options: Any) -> Any:
    quiet()
    try:
        return auto.from_pretrained(path, **options)
    except MemoryError:
        raise
    except Exception as error:  # each file format brings errors of its own: struct.error, SafetensorError, ...
        said = _one_line(error)
        if "model type" in said or "Unrecognized configuration class" in said or "Unrecognized model" in said:
            raise UnsupportedModelError(f"transformers has no causal language model for {path}: {said}") from None
        if "couldn't connect" in said or "Can't load" in said or "is not a local folder" in said:
            said = "the Hugging Face Hub has no such model, or it cannot be reached"
        raise InputError(f"cannot load {path}: {said}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
