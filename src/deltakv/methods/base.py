"""The protocol of a method: what the engine asks of it at a SELECT layer.

A method is four choices (plan, scorer, budget, refresh). The plan comes from its config; a `Selector` answers the
rest: which pages does each row keep, given what the attention of the SELECT layer has seen? It works on rows, and
does not know whether they are sequences at a decode step or positions of one sequence in evaluation mode, nor which
engine asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class SoftmaxStats:
    """What a SELECT layer's attention yields for scoring.

    logits: floating, [rows, tiles, n_heads, tile], scaled, less their tile's peak; the tiles are a row's tokens in
        order. peaks: fp32 [rows, tiles, n_heads]. lse: fp32 [rows, n_heads], the log-sum-exp of the logits themselves
        (learned sinks included). Beyond a row's end logits and peaks mean nothing.
    seq_lens: int32 [rows], tokens of each row, the current one included.
    page_size: tokens a page.
    across: where the query heads are spread over ranks and all of them have a say: gives, of a value a token, fp32
        [rows, tokens], the largest over the ranks, the same on each. None where every head is here, or picks alone.
    """

    logits: Tensor
    peaks: Tensor
    lse: Tensor
    seq_lens: Tensor
    page_size: int
    across: Callable[[Tensor], Tensor] | None = None

    @property
    def width(self) -> int:
        """Pages that the logits cover."""
        return self.logits.shape[1] * self.logits.shape[3] // self.page_size


@dataclass(frozen=True)
class Picks:
    """The pages each row keeps.

    pages: int32 [rows, width], logical pages in ascending order, 0 beyond `n_kept`.
    n_kept: int32 [rows].
    """

    pages: Tensor
    n_kept: Tensor


class Selector(Protocol):
    """Picks pages at a SELECT layer. Without state: the same statistics give the same pick."""

    def pick(self, stats: SoftmaxStats) -> Picks:
        """Which pages do the REUSE layers up to the next SELECT layer attend to? Each row on its own."""
        ...
