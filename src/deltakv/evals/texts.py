"""Texts to measure on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltakv.errors import InputError

#: What a result says it was measured on when no text was given.
BUILTIN_NAME = "pydoc_data.topics"


def builtin_text() -> str:
    """Python's own language reference, as `help()` shows it: real prose and code, some 50k tokens."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def first_tokens(tokenizer: Any, text: str, count: int, name: str) -> Tensor:
    """The first `count` tokens of `text`, int64 [1, count]. Raises `InputError` if it has fewer."""
    # No token is longer than this in characters on real text, so the rest need not be tokenised.
    ids = tokenizer(text[: count * 16], verbose=False)["input_ids"][:count]
    if len(ids) < count:
        raise InputError(f"the text {name} has {len(ids):,} tokens, but {count:,} are needed; shorten --context")
    return torch.tensor([ids])


def all_tokens(tokenizer: Any, text: str) -> Tensor:
    """Every token of `text`, int64 [tokens]."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
