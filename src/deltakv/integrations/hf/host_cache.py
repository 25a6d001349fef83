"""A transformers `Cache` whose rows are in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.layers import PagedLayer, as_autocast
from deltakv.integrations.hf.step import Chunk
from deltakv.offload.layer import Recompute
from deltakv.offload.rows import HostRows


class HostCacheLayer(PagedLayer):
    """One layer's view of the cache. `update` sends the new K, V and X to the host and gives back K and V."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores K and V, [batch, n_kv_heads, width, head_dim]."""
        self.check_in_use()
        key_states, value_states = as_autocast(key_states), as_autocast(value_states)
        self._store(key_states, value_states)
        return key_states, value_states

    @torch.compiler.disable
    def _store(self, k: Tensor, v: Tensor) -> None:
        rows, step = self._state.kv, self._state.step
        assert isinstance(rows, HostRows) and isinstance(step, Chunk)
        with torch.no_grad():
            rows.store(self.index, k, v, rows.inputs.pop(self.index, None), step.real)


class HostCache(PagedCache):
    """The KV cache of a model in host memory (KVPR, arXiv 2411.17089); layers with a sliding window, which never hold
    much, keep theirs on the device.

    Its forwards are laid out on the host, which says what crosses the bus; so they are never compiled in one piece.
    """

    layer_type: ClassVar[type[PagedLayer]] = HostCacheLayer

    def __init__(self, windows: Sequence[int | None], rows: HostRows, max_length: int | None = None) -> None:
        super().__init__(windows, rows.page_size, max_length, rows=rows)
        self.host_rows = rows

    @property
    def can_decode(self) -> bool:
        return False

    @torch.compiler.disable
    def take_input(self, layer: int, x: Tensor, positions: Tensor | None) -> None:
        """What a layer's K and V are about to be made from: X [batch, width, hidden], and the positions of its columns,
        int64 [batch or 1, width], if the layer has any. Kept where it may be recomputed from."""
        if self.state.step is not None and self.host_rows.keeps_inputs(layer):
            at = torch.zeros((1, x.shape[1]), dtype=torch.long, device=x.device) if positions is None else positions
            self.host_rows.inputs[layer] = (x, at)

    @torch.compiler.disable
    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        sinks: Tensor | None,
        recompute: Recompute | None,
    ) -> Tensor:
        """Attention of a forward's tokens over their rows: see `HostRows.attend`."""
        step = self.state.step
        assert isinstance(step, Chunk)
        return self.host_rows.attend(layer, query, key, value, step.real, scale, sinks, recompute)
