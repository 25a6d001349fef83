"""From what a user calls a model (a folder, a Hub name, a GGUF file, `smollm2`) to a transformers model."""

from deltakv.loading.model import (
    check_length,
    find_device,
    length_limit,
    load_config,
    load_model,
    load_tokenizer,
    quiet,
)
from deltakv.loading.source import locate

__all__ = [
    "check_length",
    "find_device",
    "length_limit",
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "quiet",
]
