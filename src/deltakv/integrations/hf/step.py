"""What a forward is laid out in before its first layer runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltakv.cache import Append
from deltakv.integrations.hf.padding import Columns
from deltakv.methods import Memory, Picks, Tally


@dataclass(frozen=True)
class Pick:
    """What a SELECT layer picked at a decode step, or what its WINDOW layers attend to.

    layer: the index of the layer that made it. pages: the logical pages. block_table, seq_lens: the same as a compact
        table, shaped like those of `Step`; only the last of a row's kept pages, the one of the current token, may be
        partly filled.
    looked_at: int32 [batch], what a layer that attends to its own pick reads beside it, in tokens' worth; None for one
        that attends to everything.
    """

    layer: int
    pages: Picks
    block_table: Tensor
    seq_lens: Tensor
    looked_at: Tensor | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Table and lengths on a layer's device."""
        return self.block_table.to(device), self.seq_lens.to(device)


@dataclass
class Step:
    """One forward through the model: what its layers need to know.

    decode: one query token a row onto a past.
    pages, offsets: int64 [tokens], where each new token is stored, row by row.
    block_table: int32 [batch, 1, width]; seq_lens: int32 [batch, 1], the new tokens included; 0 for a row that only
        keeps its place in the batch.
    pick: what the last SELECT layer picked; picks: all of this step, in order. window: what WINDOW layers attend to,
        from the first of them on.
    memories: what SELECT layers remember from this step on, if it counts. noted: the bounds of the rows' last pages are
        known to include it.
    """

    decode: bool
    pages: Tensor
    offsets: Tensor
    block_table: Tensor
    seq_lens: Tensor
    pick: Pick | None = None
    picks: list[Pick] = field(default_factory=list)
    window: Pick | None = None
    memories: dict[int, Memory | Tally] = field(default_factory=dict)
    noted: bool = False
    _moved: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def of(self, layer: int) -> Step:
        """This forward as a layer sees it."""
        return self

    def picked(self, pick: Pick) -> None:
        """What REUSE layers attend to from here on."""
        self.pick = pick
        self.picks.append(pick)

    def on(self, device: torch.device, name: str) -> Tensor:
        """The tensor `name` on a layer's device; copied once a step for each device."""
        tensor: Tensor = getattr(self, name)
        if tensor.device == device:
            return tensor
        key = (name, device)
        if key not in self._moved:
            self._moved[key] = tensor.to(device)
        return self._moved[key]


@dataclass(kw_only=True)
class Chunk(Step):
    """A forward of any number of columns, laid out on the host: its tensors are on the CPU, as ops that look at them
    want it.

    width: query columns. onto_past: the cache held something before.
    real: bool [batch, width], which columns are tokens and not padding; stored: int64 [tokens], their indices in the
        flattened batch, or None where all of them are.
    past_lens: int32 [batch], tokens of each row without the new ones.
    by_layer: the same forward as a layer sees it, for layers whose pages lie elsewhere than the others'.
    """

    width: int
    onto_past: bool
    append: Append
    columns: Columns
    real: Tensor
    stored: Tensor | None
    past_lens: Tensor
    by_layer: dict[int, Chunk] = field(default_factory=dict)

    def of(self, layer: int) -> Chunk:
        return self.by_layer.get(layer, self)
