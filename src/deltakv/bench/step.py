"""The decode step: a model's forward with its LM head and argmax, one token a row, at its best on this device.

Every contender runs the same model with the same shapes in the same process: compiled in one piece and captured as
one CUDA graph on a GPU, eagerly on a CPU. They come one after the other, because two large caches do not fit.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

import deltakv
from deltakv.bench.clock import Times, timed
from deltakv.bench.floors import step_cost
from deltakv.bench.kernels import Kernel, kernels_of, parts
from deltakv.bench.random_model import fill_paged, make_static
from deltakv.config import Full, Method
from deltakv.integrations.hf import Handle, PagedCache
from deltakv.integrations.hf.generation import COMPILE_OPTIONS
from deltakv.integrations.hf.support import model_shape

#: Stock transformers: sdpa over a static cache, compiled as `generate` compiles it.
STATIC = "stock-static"

#: Tokens that `generate` makes before its loop is timed: the first steps compile and capture.
_LOOP_WARMUP = 12


@dataclass(frozen=True)
class Settings:
    """runs, warmup: timed steps and those before them. compiled: in one piece (a CUDA graph on a GPU).
    loop: tokens that `generate` makes while its loop is timed, 0 for none. profile: the kernels of a step too (GPU).
    finished: so many of the rows have finished, and only keep their place in the batch.
    """

    runs: int
    warmup: int
    compiled: bool
    loop: int = 0
    profile: bool = False
    finished: int = 0

    @property
    def room(self) -> int:
        """Tokens that a row may grow by while it is measured."""
        return self.runs + self.warmup + self.loop + 2 * _LOOP_WARMUP


@dataclass(frozen=True)
class Entry:
    """What a contender took for rows of `lengths` tokens, 0 for one that has finished. weight_bytes, kv_bytes: what any
    step that gives these rows their answers must read; stock reads more when lengths differ, and its floor is the same.
    loop: milliseconds of a step of `generate`, all that it does around the forward included."""

    name: str
    lengths: Sequence[int]
    times: Times
    weight_bytes: float
    kv_bytes: float
    loop: float | None = None
    kernels: list[Kernel] = field(default_factory=list)

    def numbers(self, bandwidth: float) -> dict[str, Any]:
        """For a JSON file. bandwidth: bytes a second of a copy in this run."""
        read = self.weight_bytes + self.kv_bytes
        floor = 1e3 * read / bandwidth
        return {
            "method": self.name,
            "batch": len(self.lengths),
            "finished": list(self.lengths).count(0),
            "context": max(self.lengths),
            "tokens": sum(self.lengths),
            **self.times.numbers(),
            "bytes": round(read),
            "floor_ms": floor,
            "share_of_floor": floor / self.times.median,
            "generate_ms": self.loop,
            "kernels": [vars(kernel) for kernel in self.kernels],
            "parts": parts(self.kernels, self.weight_bytes, self.kv_bytes, bandwidth),
        }


@dataclass
class Contender:
    """A way to decode with a cache of its own. handle: None for stock."""

    name: str
    model: Any
    method: Method
    handle: Handle | None
    cache: Any
    step: Any

    def measure(self, lengths: Sequence[int], settings: Settings) -> Entry:
        """A step of rows of these lengths, their new tokens not counted. On a GPU it is an error if one waits."""
        model = self.model
        self._refill(lengths)
        token = torch.randint(model.config.vocab_size, (len(lengths), 1), device=model.device)
        finished = None
        if settings.finished:
            going_on = len(lengths) - settings.finished
            finished = torch.arange(len(lengths), device=model.device) >= going_on
            lengths = [*lengths[:going_on], *[0] * settings.finished]
        kernels = []
        with torch.no_grad():
            times = timed(lambda: self.step(token, finished), model.device, settings.runs, settings.warmup)
            if settings.profile and model.device.type == "cuda":
                kernels = kernels_of(lambda: self.step(token, finished))
        loop = self._loop(lengths, settings) if settings.loop else None
        return Entry(self.name, lengths, times, *step_bytes(model, self.method, lengths), loop, kernels)

    def _refill(self, lengths: Sequence[int]) -> None:
        if self.handle is not None:
            fill_paged(self.cache, self.model, lengths)
        else:
            for layer in self.cache.layers:  # its rows are all as long as the longest, with padding
                layer.cumulative_length.fill_(max(lengths))

    def _loop(self, lengths: Sequence[int], settings: Settings) -> float:
        """Milliseconds from step to step of a `generate`, once it is under way: the median."""
        self._refill(lengths)
        width = max(lengths)
        ids = torch.randint(3, self.model.config.vocab_size, (len(lengths), width + 1))
        mask = (torch.arange(width + 1) >= width - torch.tensor(lengths)[:, None]).to(self.model.device, torch.long)
        watch = _Watch()
        options = {"past_key_values": self.cache, "attention_mask": mask, "stopping_criteria": [watch]}
        generate_seconds(self.model, ids, _LOOP_WARMUP + settings.loop, **options)
        return 1e3 * statistics.median(b - a for a, b in pairwise(watch.times[-settings.loop - 1 :]))


class _Watch(StoppingCriteria):
    """Looks at the clock after each step, and stops nothing. times: seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._no: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        if self._no is None:
            self._no = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self._no


def generate_seconds(model: Any, ids: Tensor, count: int, **options: Any) -> float:
    """Seconds that `generate` takes for `count` new tokens a row, greedily, no row ending early."""
    ids = ids.to(model.device)
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    assert out.shape[1] == ids.shape[1] + count  # and the tokens are there: the device is done
    int(out[0, -1])
    return time.perf_counter() - start


@contextmanager
def contender(
    model: Any, name: str, method: Method | str, batch: int, capacity: int, *, compiled: bool
) -> Iterator[Contender]:
    """`method` (or `STATIC`) made ready for `batch` rows of up to `capacity` tokens; its memory is free afterwards."""
    made = None
    try:
        with ExitStack() as stack:
            if isinstance(method, str):
                cache = make_static(model, batch, capacity)
                made = Contender(name, model, Full(), None, cache, _make_step(model, None, cache, compiled))
            else:
                handle = stack.enter_context(deltakv.apply(model, method))
                cache = handle.new_cache(capacity, static=compiled)
                made = Contender(name, model, method, handle, cache, _make_step(model, handle, cache, compiled))
            del cache
            yield made
    finally:
        if made is not None:
            made.cache = made.step = None  # whoever still holds the contender does not hold the memory
        torch.compiler.reset()  # and with the code the graphs that it captured, which hold memory too
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def step_bytes(model: Any, method: Method, lengths: Sequence[int]) -> tuple[float, float]:
    """Bytes that a step must read: weights once, and K and V of each row, its new token included."""
    cost = step_cost(model.config, model_shape(model.config).windows, method, model.dtype)
    rows = (sum(cost.kv_bytes(length + 1, 1, method).values()) for length in lengths if length)
    return cost.weight_bytes(len(lengths)), sum(rows)


def _make_step(
    model: Any, handle: Handle | None, cache: Any, compiled: bool
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The step as a function of the tokens [batch, 1] and of which rows have finished, giving the next tokens; what the
    host does for it included."""

    def forward(token: Tensor) -> Tensor:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        result: Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return result

    how: dict[str, Any] = {"mode": "reduce-overhead"} if handle is None else {"options": COMPILE_OPTIONS}
    run = torch.compile(forward, fullgraph=True, dynamic=False, **how) if compiled else forward
    if handle is None:
        return lambda token, finished: run(token)  # stock goes on with rows that have finished

    def announced(token: Tensor, finished: Tensor | None) -> Tensor:
        assert isinstance(cache, PagedCache) and handle.announce(cache, finished)
        return run(token)

    return announced
