"""The layers of a cache, as transformers sees them: a view of the paged pool, or its own sliding window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from deltakv.cache import RowStore
from deltakv.cache.pool import KVPool
from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.decoding import Decoding
from deltakv.integrations.hf.known import Known
from deltakv.integrations.hf.padding import Columns
from deltakv.integrations.hf.step import Chunk, Step
from deltakv.ops import store_kv


@dataclass
class State:
    """What the layers of one cache share. Apart from the cache, so that no reference cycle keeps its memory alive.

    kv: the rows. pool: the memory of their K and V, where it is on the device. known: what the method knows of them.
    columns: the committed ones, None before the first forward; while decoding has started, those before it.
    step: the forward under way.
    """

    kv: RowStore
    pool: KVPool
    decoding: Decoding
    columns: Columns | None = None
    step: Step | None = None
    known: Known = field(default_factory=Known)

    @property
    def seen(self) -> int:
        """Committed columns, padding included: what transformers calls the cache's length."""
        if self.decoding.started:
            return self.decoding.seen
        return self.columns.seen if self.columns is not None else 0


def as_autocast(x: Tensor) -> Tensor:
    """`x` as autocast would hand it to attention; as it is, where autocast is off."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class PagedLayer(CacheLayerMixin):
    """One layer's view of the cache. `update` stores the new K and V and gives back just these: attention reads
    the pool itself."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, state: State, index: int) -> None:
        super().__init__()
        self._state = state
        self.index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores K and V, [batch, n_kv_heads, width, head_dim], at the step's slots."""
        step = self.check_in_use().of(self.index)
        key_states, value_states = as_autocast(key_states), as_autocast(value_states)
        k_pool, v_pool = self._state.pool.ensure_layer(self.index, key_states)
        k = key_states.detach().transpose(1, 2).flatten(0, 1)
        v = value_states.detach().transpose(1, 2).flatten(0, 1)
        if isinstance(step, Chunk) and step.stored is not None:
            k, v = k[step.on(k.device, "stored")], v[step.on(k.device, "stored")]
        store_kv(k_pool, v_pool, k, v, step.on(k.device, "pages"), step.on(k.device, "offsets"))
        return key_states, value_states

    def check_in_use(self) -> Step:
        """The step under way. Raises `UnsupportedUseError` if there is none."""
        if self._state.step is None:
            raise UnsupportedUseError(
                "this cache belongs to deltakv, and no method is applied to the model; use it inside "
                "`with deltakv.apply(model, method)`, or start anew without past_key_values"
            )
        return self._state.step

    def get_seq_length(self) -> int:
        return self._state.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._state.decoding.announced:  # no mask is made then, and a number that grows would be compiled in
            return self._state.decoding.capacity, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class WindowedLayer(DynamicSlidingWindowLayer):
    """transformers' own cache of a layer with a sliding window, with two things that its 5.17 lacks."""

    keys: Any
    values: Any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the parent, cut to what the mask covers, also while the past is recorded for `crop`."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]

    def reset(self) -> None:
        """Forgets its tokens (5.17 keeps zeros in their place)."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0
