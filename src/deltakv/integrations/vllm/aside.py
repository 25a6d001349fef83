"""Work beside a step's own stream, inside a captured graph or not: small kernels that hide behind large ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Later(Generic[T]):
    """What work gives, and when. held: what it reads, which the step's own stream may not give to others before."""

    _value: T
    _done: torch.cuda.Event | None = None
    _held: Any = None

    def result(self) -> T:
        """What comes next on the current stream finds the value there. Of the work's tensors only those in the value
        may be read."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = self._held = None
        return self._value


def aside(work: Callable[..., T], inputs: Any, like: Tensor) -> Later[T]:
    """`work(inputs)` on a stream of its own, once the current stream has come this far; at once if `like` is on no GPU.

    The result has to be taken on the same stream before the step ends: a graph cannot be captured with work that is
    left over, and what was not taken may lose its memory while it runs.
    """
    if not like.is_cuda:
        return Later(work(inputs))
    stream, done = _stream(like.device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value = work(inputs)
        done.record()
    return Later(value, done, inputs)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
