"""A transformers `Cache` whose layers give up pages: memory follows what an evicting method keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from deltakv.cache.layered import LayeredRows
from deltakv.cache.rows import GONE, Row
from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.step import Chunk
from deltakv.methods import Tally


class EvictingCache(PagedCache):
    """The KV cache of a model under a method that evicts.

    Which pages go is decided on the device, but the host gives them back: its forwards are laid out on the host, and
    are never compiled in one piece.
    gives_up: pages that steps drop leave the pool; in evaluation mode they wait for the next decode step.
    """

    evicts: ClassVar[bool] = True

    def __init__(self, windows: Sequence[int | None], page_size: int) -> None:
        rows = LayeredRows([index for index, window in enumerate(windows) if window is None], page_size)
        super().__init__(windows, page_size, rows=rows)
        self.layered = rows
        self.gives_up = True
        self.state.pool = rows.pool

    @property
    def can_decode(self) -> bool:
        return False

    def begin(self, batch: int, width: int, mask: Tensor | None) -> Chunk:
        """See `PagedCache.begin`; each layer has places and a table of its own. A decode step names what is left by
        itself; several tokens at once see a past without the pages that are gone."""
        step = super().begin(batch, width, mask)
        for layer, append in self.layered.appends.items():
            slots = torch.tensor([slot for row in append.slots for slot in row], dtype=torch.long)
            table, past = self.layered.by_layer[layer].block_table(max(append.lengths)), step.past_lens
            if not step.decode and self.layered.has_gone(layer):
                table, kept = self.layered.compact(layer)
                past = torch.tensor(kept, dtype=torch.int32)
            step.by_layer[layer] = dataclasses.replace(
                step,
                pages=slots // self.page_size,
                offsets=slots % self.page_size,
                block_table=table,
                past_lens=past,
                by_layer={},
                _moved={},
            )
        return step

    def commit(self) -> None:
        """See `PagedCache.commit`. What the step has dropped leaves the pool."""
        step = self.state.step
        super().commit()
        if step is not None and self.gives_up:
            dropped = {at: tally.dropped for at, tally in step.memories.items() if isinstance(tally, Tally)}
            if dropped:  # the host waits for all layers at once; what had gone before is among it
                for layer, numbers in zip(dropped, torch.stack(list(dropped.values())).cpu(), strict=True):
                    self.layered.drop(layer, numbers)

    def rows_of(self, layer: int) -> list[Row]:
        return self.layered.by_layer[layer].rows

    def check_layers(self, evicting: Sequence[int]) -> None:
        """Raises `UnsupportedUseError` if pages are gone that layers other than `evicting` would read."""
        if others := [at for at in self.layered.by_layer if at not in evicting and self.layered.has_gone(at)]:
            raise UnsupportedUseError(
                f"this cache has given up pages, and layer {others[0]} would read them; go on with the method that has "
                "dropped them, or prefill a new cache"
            )

    def _truncate(self, counts: list[int]) -> None:
        for kv in self.layered.by_layer.values():
            for row, count in zip(kv.rows, counts, strict=True):
                if 0 < count < row.length and row.pages[(count - 1) // self.page_size] == GONE:
                    raise UnsupportedUseError(
                        f"a row cannot go back to {count} tokens, because a layer has dropped the page of the last "
                        "of them; go back less far than the method's `recent`, or prefill a new cache"
                    )
        super()._truncate(counts)
