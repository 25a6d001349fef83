"""A whole `generate`, from a short prompt to a long answer, loop and all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import deltakv
from deltakv.bench.step import generate_seconds
from deltakv.config import Method


@dataclass(frozen=True)
class Generated:
    """What a contender took for `batch` rows of `output_len` new tokens. seconds: without compiling."""

    name: str
    batch: int
    input_len: int
    output_len: int
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "method": self.name,
            "batch": self.batch,
            "input_len": self.input_len,
            "output_len": self.output_len,
            "seconds": self.seconds,
            "tokens_per_s": self.batch * self.output_len / self.seconds,
            "ms_a_step": 1e3 * self.seconds / self.output_len,
        }


def measure_generation(
    model: Any,
    methods: Sequence[tuple[str, Method | str]],
    batch: int,
    input_len: int,
    output_len: int,
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[Generated]:
    """Each contender in turn, after a few tokens that compile what a cache of the same room then runs."""
    ids = torch.randint(3, model.config.vocab_size, (batch, input_len))
    total = input_len + output_len
    for name, method in methods:
        advance(name)
        if isinstance(method, str):
            seconds = _stock(model, ids, output_len)
        else:
            with deltakv.apply(model, method) as handle:
                for count in (min(8, output_len), output_len):
                    cache = handle.new_cache(total, static=model.device.type == "cuda")
                    seconds = generate_seconds(model, ids, count, past_key_values=cache)
                    del cache
        yield Generated(name, batch, input_len, output_len, seconds)
        torch.compiler.reset()
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _stock(model: Any, ids: torch.Tensor, output_len: int) -> float:
    """`generate` with transformers' static cache, the same for the run that compiles and the one that counts."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + output_len)
    for count in (min(8, output_len), output_len):
        cache.reset()
        seconds = generate_seconds(model, ids, count, past_key_values=cache)
    return seconds
