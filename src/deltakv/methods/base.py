"""The protocol of a method: what the engine asks of it at a SELECT layer.

A method is four choices (plan, scorer, budget, refresh). The plan comes from its config, and so does what a SELECT
layer shows it (`deltakv.config.Sees`); a `Selector` answers the rest: which pages does each row keep, given what was
seen? It works on rows, and does not know whether they are sequences at a decode step or positions of one sequence in
evaluation mode, nor which engine asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from deltakv.methods.memory import Memory, Tally

#: Makes values of pages, [rows, pages], of those of their tokens, [rows, tokens]; each row by itself.
PagesOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SoftmaxStats:
    """What a SELECT layer's attention yields for scoring.

    logits: floating, [rows, tiles, n_heads, tile], scaled, less their tile's peak; the tiles are a row's tokens in
        order. peaks: fp32 [rows, tiles, n_heads]. lse: fp32 [rows, n_heads], the log-sum-exp of the logits themselves
        (learned sinks included). Beyond a row's end logits and peaks mean nothing.
    seq_lens: int32 [rows], tokens of each row, the current one included.
    page_size: tokens a page.
    across: where the query heads are spread over ranks and all of them have a say: gives what `by_page` does, of the
        largest value of each token over the ranks, the same on each. None where every head is here, or picks alone.
    """

    logits: Tensor
    peaks: Tensor
    lse: Tensor
    seq_lens: Tensor
    page_size: int
    across: Callable[[Tensor, PagesOf], Tensor] | None = None

    @property
    def width(self) -> int:
        """Pages that the logits cover."""
        return self.logits.shape[1] * self.logits.shape[3] // self.page_size

    def by_page(self, tokens: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
        """fp32 [rows, pages]: `reduce` (torch.sum, torch.amax) over each page's tokens of a value a token, fp32 [rows,
        tokens], that is the largest over some heads."""

        def pages_of(values: Tensor) -> Tensor:
            return reduce(values.unflatten(1, (-1, self.page_size)), -1)

        return pages_of(tokens) if self.across is None else self.across(tokens, pages_of)


@dataclass(frozen=True)
class PageBounds:
    """What a SELECT layer knows of pages that it has not read (`Sees.BOUNDS`).

    query: [rows, n_heads, head_dim], after RoPE. scale: what products with it are multiplied by.
    low, high: [rows, width, n_kv_heads, head_dim], the least and the greatest K of each page, channel by channel. Of a
        row's last page, which may be partly filled, they mean nothing, and beyond.
    seq_lens, page_size: as in `SoftmaxStats`.
    """

    query: Tensor
    scale: float
    low: Tensor
    high: Tensor
    seq_lens: Tensor
    page_size: int


@dataclass(frozen=True)
class Lengths:
    """All that a SELECT layer needs that picks without a look (`Sees.LENGTHS`).

    seq_lens, page_size: as in `SoftmaxStats`. width: the pages that there is room for.
    """

    seq_lens: Tensor
    page_size: int
    width: int


@dataclass(frozen=True)
class Picks:
    """The pages each row keeps.

    pages: int32 [rows, width], logical pages in ascending order, 0 beyond `n_kept`.
    n_kept: int32 [rows].
    """

    pages: Tensor
    n_kept: Tensor


class Selector(Protocol):
    """Picks pages at a SELECT layer. Without state: what looks the same gives the same pick."""

    def pick(self, seen: Any) -> Picks:
        """Which pages do the REUSE layers up to the next SELECT layer attend to? Each row on its own.

        seen: what the config's `sees` says: `SoftmaxStats` (also for `Sees.KEYS`), `PageBounds` or `Lengths`.
        """
        ...


class Refresher(Protocol):
    """A selector in parts, for methods whose config `remembers`: scores are made when they are due, and stand until
    the next time. Each part treats each row on its own, and has no state: the engine keeps the `Memory`."""

    def due(self, query: Tensor, memory: Memory, seq_lens: Tensor) -> Tensor:
        """bool [rows]: whether to score anew. query: [rows, n_heads, head_dim]; seq_lens: int32 [rows]."""
        ...

    def score(self, stats: SoftmaxStats) -> Tensor:
        """fp32 [rows, width]: what each page is worth. Rows that are not due have 0 tokens here."""
        ...

    def choose(self, scores: Tensor, seq_lens: Tensor, page_size: int) -> Picks:
        """The pick, from scores that stand; infinite for pages that have come since, which are kept."""
        ...


class Evictor(Protocol):
    """What a method says that drops pages for good (its config `evicts`). All it asks of a pool is that a page may be
    given back: pages are counted as if none were gone, and a dropped one is never listed again. Without state, each row
    on its own, as a `Refresher`.

    numbers: how many a page has in `Tally.worth`.
    """

    numbers: ClassVar[int]

    def after_step(self, masses: Tensor, tally: Tally, seq_lens: Tensor, page_size: int) -> Tally:
        """The tally after a step, with what is to be dropped from the next on.

        masses: fp32 [rows, n_heads, width], the attention of each query head on each page; 0 on dropped ones.
        seq_lens: int32 [rows], the current token included, dropped ones too. The current token's page stays.
        """
        ...


def listed(kept: Tensor) -> Picks:
    """The pages that bool [rows, width] says, as a pick."""
    width = kept.shape[1]
    page = torch.arange(width, dtype=torch.int32, device=kept.device)
    ascending = torch.sort(torch.where(kept, page, width), dim=1).values
    return Picks(torch.where(ascending < width, ascending, 0).to(torch.int32), kept.sum(1, dtype=torch.int32))


def marked(picks: Picks, width: int) -> Tensor:
    """bool [rows, width]: the pages of a pick; what `listed` takes."""
    real = torch.arange(picks.pages.shape[1], device=picks.pages.device) < picks.n_kept[:, None]
    count = torch.zeros((len(picks.pages), width), dtype=torch.int32, device=picks.pages.device)
    return count.scatter_add(1, picks.pages.long(), real.int()) > 0
