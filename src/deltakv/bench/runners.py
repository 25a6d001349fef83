"""What decodes: a method of this project on a paged cache, or stock transformers as a baseline.

A runner holds a cache that a text has been prefilled into, decodes from it, and rewinds to where it was, so
that several runners take turns in one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

import deltakv
from deltakv.config import Method
from deltakv.errors import UnsupportedUseError

#: Stock transformers: `generate` as it comes (a cache that concatenates), and sdpa with a static cache.
BASELINES = ("stock", "stock-static")
#: Tokens of a prefill a forward, so that a long one shows progress and needs little memory.
PREFILL_CHUNK = 2048


class Checkpoint:
    """Where a `PagedCache` or `DynamicCache` is now, to come back to as often as wanted."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._length = cache.get_seq_length()
        # A window drops what it has passed and cannot be cropped back; but an update makes new tensors and leaves
        # the old ones alone, so a shallow copy holds all that it was.
        self._windows = {i: copy.copy(layer) for i, layer in enumerate(cache.layers) if layer.is_sliding}

    def restore(self) -> None:
        """Drops all tokens since."""
        cache, layers = self._cache, self._cache.layers
        added = cache.get_seq_length() - self._length
        cache.layers = [layer for layer in layers if not layer.is_sliding]
        cache.crop(-added)
        cache.layers = [copy.copy(self._windows[i]) if i in self._windows else layer for i, layer in enumerate(layers)]


class Runner(Protocol):
    """name: as the user wrote the method. cache: prefilled, to be passed as `past_key_values`."""

    name: str
    cache: Any

    def open(self) -> Any:
        """A context in which the model decodes this way; gives the handle, or None for stock."""
        ...

    def rewind(self) -> None:
        """Drops all tokens that were decoded."""
        ...

    def kv_bytes(self) -> int:
        """Bytes that K and V take."""
        ...


class MethodRunner:
    """A method on a `PagedCache`, which may be shared with other methods of the same page size."""

    def __init__(self, name: str, model: Any, method: Method, cache: Any) -> None:
        self.name, self.model, self.method, self.cache = name, model, method, cache
        self._start = Checkpoint(cache)

    @contextmanager
    def open(self) -> Iterator[Any]:
        with deltakv.apply(self.model, self.method) as handle:
            yield handle

    def rewind(self) -> None:
        self._start.restore()

    def kv_bytes(self) -> int:
        return self.cache.kv_bytes


class StockRunner:
    """Stock attention on a `DynamicCache`, which concatenates at each step."""

    def __init__(self, name: str, cache: Any) -> None:
        self.name, self.cache = name, cache
        self._start = Checkpoint(cache)

    @contextmanager
    def open(self) -> Iterator[None]:
        yield None

    def rewind(self) -> None:
        self._start.restore()

    def kv_bytes(self) -> int:
        return layer_bytes(self.cache)


class StaticRunner:
    """Stock sdpa on a `StaticCache`, written in place."""

    def __init__(self, name: str, cache: Any) -> None:
        self.name, self.cache = name, cache
        self._length = int(cache.get_seq_length())

    @contextmanager
    def open(self) -> Iterator[None]:
        yield None

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._length)

    def kv_bytes(self) -> int:
        return layer_bytes(self.cache)


def prefill(model: Any, cache: Any, ids: Tensor, advance: Callable[[int], None] = lambda tokens: None) -> None:
    """Runs `ids` [1, tokens] into `cache`, chunk by chunk. `advance` hears of the tokens done."""
    for chunk in ids.split(PREFILL_CHUNK, dim=1):
        model(chunk.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        advance(chunk.shape[1])


def repeat_rows(cache: Any, batch: int) -> None:
    """Makes `batch` rows of a cache's one row, each with K and V of its own, in place."""
    if batch > 1:
        cache.batch_repeat_interleave(batch)
        if hasattr(cache, "unshare"):
            cache.unshare()


def dynamic_cache(config: Any, paged: Any) -> Any:
    """A `DynamicCache` with the one row of a `PagedCache`, copied."""
    from transformers import DynamicCache

    dynamic = DynamicCache(config=config)
    (row,), tokens = paged.kv.rows, paged.get_seq_length()
    for index, window in enumerate(paged.windows):
        if window is None:
            k, v = (pool[row.pages].flatten(0, 1)[:tokens] for pool in paged.kv.pool.layer(index))
            dynamic.update(*(x.transpose(0, 1)[None].contiguous() for x in (k, v)), index)
        else:
            dynamic.layers[index] = copy.copy(paged.layers[index])
    return dynamic


def static_cache(config: Any, dynamic: Any, batch: int, max_length: int) -> Any:
    """A `StaticCache` of `batch` rows, each the one row of a `DynamicCache`, which loses it layer by layer.

    Raises `UnsupportedUseError` for models with sliding-window layers, whose static layers cannot be rewound.
    """
    from transformers import StaticCache

    static = StaticCache(config=config, max_cache_len=max_length)
    if any(layer.is_sliding for layer in static.layers):
        raise UnsupportedUseError(
            "the baseline 'stock-static' needs a model without sliding-window layers; use 'stock' or 'full'"
        )
    for index, layer in enumerate(dynamic.layers):
        static.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), index)
        layer.keys = layer.values = None
    return static


def layer_bytes(cache: Any) -> int:
    """Bytes of K and V in a cache of transformers."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
