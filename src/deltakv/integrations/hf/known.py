"""What a method knows of a cache's rows between steps: bounds of pages, and memories of queries.

Tensors with rows first, one set a SELECT layer. They belong to one handle: another method on the same cache starts with
none. While rows decode, steps move them on in place and the host looks at nothing; before that, and whenever rows have
changed in another way, the host brings them up to date (`prepare`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltakv.cache.pool import KVPool
from deltakv.cache.rows import GONE, Row
from deltakv.config import Method, Sees
from deltakv.integrations.hf.decoding import mark_static
from deltakv.methods import Memory, Tally

_BY_ROW = (*Memory.BY_ROW, *Tally.BY_ROW)

#: Pages whose bounds are found at once.
_BLOCK = 256


class Known:
    """owner: the name of the handle whose method knows this. layers: its SELECT layers' tensors, by name.

    bounded: by row, the leading pages whose bounds are known.
    """

    def __init__(self) -> None:
        self.owner = ""
        self.layers: dict[int, dict[str, Tensor]] = {}
        self.bounded: list[int] = []

    def ready(self, owner: str, rows: int, width: int) -> bool:
        """Whether nothing has to be prepared for tables of that width, as far as shapes tell."""
        fits = all(len(t) == rows and t.shape[1] >= width for x in self.layers.values() for t in _by_page(x))
        return self.owner == owner and fits

    def prepare(
        self,
        owner: str,
        method: Method,
        select: Sequence[int],
        n_heads: int,
        pool: KVPool,
        rows_of: Callable[[int], Sequence[Row]],
        width: int,
        *,
        static: bool,
        numbers: int = 1,
    ) -> None:
        """Makes room for tables of `width` pages, and finds the bounds of full pages that are not known yet.

        select: the method's SELECT layers. n_heads: query heads. rows_of: by layer, as they are committed. numbers:
        those of a page in a `Tally`.
        """
        rows = rows_of(select[0]) if select else []
        if self.owner != owner or any(len(t) != len(rows) for x in self.layers.values() for t in x.values()):
            self.clear()
            self.owner = owner
        bounds = method.sees is Sees.BOUNDS
        if not bounds and not method.remembers:
            return
        self.bounded = self.bounded or [0] * len(rows)
        for layer in select:
            k, _ = pool.layer(layer)
            _, page_size, n_kv, dim = k.shape
            shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
            if bounds:
                shapes |= dict.fromkeys(("low", "high"), ((len(rows), width, n_kv, dim), k.dtype))
            if method.evicts:
                shapes |= {
                    "worth": ((len(rows), width, numbers), torch.float32),
                    "dropped": ((len(rows), width), torch.bool),
                    "steps": ((len(rows),), torch.int32),
                }
            elif method.remembers:
                shapes |= {
                    "scores": ((len(rows), width), torch.float32),
                    "query": ((len(rows), n_heads, dim), torch.float32),
                    "seen": ((len(rows),), torch.int32),
                }
            new = self._fit(layer, shapes, k.device, static)
            if method.evicts and new:
                for index, row in enumerate(rows_of(layer)):
                    gone = [at for at, page in enumerate(row.pages) if page == GONE]
                    self.layers[layer]["dropped"][index, gone] = True
            if bounds:
                self._find_bounds(layer, k, rows, page_size)
        if bounds:
            self.bounded = [row.length // pool.page_size for row in rows]

    def memory(self, layer: int, width: int, row: slice = slice(None)) -> Any:
        """The `Memory` or `Tally` of a layer, over the first `width` pages; views. row: of some rows only."""
        known = self.layers[layer]
        kind = Tally if "dropped" in known else Memory
        by_page = {name: known[name][row, :width] for name in kind.BY_PAGE}
        return kind(**by_page, **{name: known[name][row] for name in kind.BY_ROW})

    def of_row(self, layer: int, row: int) -> Any:
        """The memory of one row, if the method has any."""
        known = self.layers.get(layer, {})
        remembered = [known[name] for name in ("scores", "dropped") if name in known]
        return self.memory(layer, remembered[0].shape[1], slice(row, row + 1)) if remembered else None

    def remember(self, layer: int, memory: Any) -> None:
        """A step counts: what it remembers stands from now on. Can be traced."""
        known = self.layers[layer]
        for name in memory.BY_PAGE:
            value = getattr(memory, name)
            known[name][:, : value.shape[1]].copy_(value)
        for name in memory.BY_ROW:
            known[name].copy_(getattr(memory, name))

    def note_page(self, layer: int, k_pool: Tensor, pages: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the bounds of each row's last page anew, from `k_pool` at the physical `pages`, int64 [rows]; when the
        row goes on to the next page, they are right. seq_lens: int32 [rows]. Returns `low`, `high`. Can be traced."""
        low, high = self.layers[layer]["low"], self.layers[layer]["high"]
        page_size = k_pool.shape[1]
        last = (seq_lens - 1).clamp_min(0)
        row = torch.arange(len(seq_lens), device=low.device)
        at = (last // page_size).long()
        k = k_pool[pages]
        real = (torch.arange(page_size, device=k.device) <= (last % page_size)[:, None])[..., None, None]
        live = (seq_lens > 0)[:, None, None]  # a row that has finished has written nothing
        low[row, at] = torch.where(live, torch.where(real, k, float("inf")).amin(1), low[row, at])
        high[row, at] = torch.where(live, torch.where(real, k, float("-inf")).amax(1), high[row, at])
        return low, high

    def grown(self, lengths: Sequence[int], page_size: int) -> None:
        """Rows have come to `lengths` by steps that noted their pages."""
        if self.bounded:
            self.bounded = [length // page_size for length in lengths]

    def truncated(self, lengths: Sequence[int], page_size: int, *, final: bool = False) -> None:
        """Tokens were dropped, or came in another way than by decoding: what queries have seen is forgotten.

        final: a page that was dropped is lost. Otherwise it is as if it never had been.
        """
        if self.bounded:
            self.bounded = [min(old, n // page_size) for old, n in zip(self.bounded, lengths, strict=True)]
        for known in self.layers.values():
            for name in ("worth", "steps", "seen"):
                if name in known:
                    known[name].zero_()
            if "dropped" in known:
                dropped = known["dropped"]
                page = torch.arange(dropped.shape[1], device=dropped.device)
                gone = page * page_size < torch.tensor(lengths, device=dropped.device)[:, None]
                dropped.logical_and_(gone & final)

    def rearrange(self, indices: Sequence[int]) -> None:
        """New row i is old row `indices[i]`."""
        if self.bounded:
            self.bounded = [self.bounded[index] for index in indices]
        for known in self.layers.values():
            for name, tensor in known.items():
                chosen = tensor[torch.tensor(indices, device=tensor.device)]
                if chosen.shape == tensor.shape:
                    tensor.copy_(chosen)
                else:
                    known[name] = chosen

    def clear(self) -> None:
        self.owner, self.layers, self.bounded = "", {}, []

    def _fit(
        self, layer: int, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device, static: bool
    ) -> bool:
        """Whether they were not there, or not as wide."""
        known = self.layers.setdefault(layer, {})
        grown = False
        for name, (shape, dtype) in shapes.items():
            old = known.get(name)
            if old is not None and (name in _BY_ROW or old.shape[1] >= shape[1]):
                continue
            if old is not None:  # somewhat more than is asked for, since rows grow page by page
                shape = (shape[0], max(shape[1], old.shape[1] + old.shape[1] // 2), *shape[2:])
            with torch.inference_mode(False):  # made in inference mode, it could not be written outside of it
                new = torch.zeros(shape, dtype=dtype, device=device)
                if old is not None:
                    new[:, : old.shape[1]] = old
            if static:
                mark_static(new)
            known[name], grown = new, True
        return grown

    def _find_bounds(self, layer: int, k: Tensor, rows: Sequence[Row], page_size: int) -> None:
        low, high = self.layers[layer]["low"], self.layers[layer]["high"]
        for index, row in enumerate(rows):
            for first in range(self.bounded[index], row.length // page_size, _BLOCK):
                pages = row.pages[first : min(first + _BLOCK, row.length // page_size)]
                some = k[torch.tensor(pages, device=k.device)]
                low[index, first : first + len(pages)] = some.amin(1)
                high[index, first : first + len(pages)] = some.amax(1)


def _by_page(known: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in known.items() if name not in _BY_ROW]
