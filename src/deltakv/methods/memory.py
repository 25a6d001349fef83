"""What outlives a step: the scores of the last look and the query that looked, or what pages have been worth so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Of a SELECT layer, row by row. Never changed: a step makes a new one, which counts when the step does.

    scores: fp32 [rows, width], the pages' worth at the last look. query: fp32 [rows, n_heads, head_dim], the one that
    looked. seen: int32 [rows], the row's tokens then; 0 for a row that has nothing to remember.
    """

    BY_PAGE: ClassVar[tuple[str, ...]] = ("scores",)
    BY_ROW: ClassVar[tuple[str, ...]] = ("query", "seen")

    scores: Tensor
    query: Tensor
    seen: Tensor

    def renewed(self, due: Tensor, query: Tensor, scores: Tensor, seq_lens: Tensor) -> Memory:
        """With what the rows that are `due` (bool [rows]) have seen; other rows as they were."""
        return Memory(
            torch.where(due[:, None], scores, self.scores),
            torch.where(due[:, None, None], query.float(), self.query),
            torch.where(due, seq_lens, self.seen),
        )

    def standing(self, page_size: int) -> Tensor:
        """fp32 [rows, width]: the scores as they stand; infinite for pages that have gained tokens since."""
        page = torch.arange(self.scores.shape[1], device=self.scores.device)
        return self.scores.masked_fill(page >= (self.seen // page_size)[:, None], float("inf"))

    def likeness(self, query: Tensor) -> Tensor:
        """fp32 [rows]: the cosine between the remembered query and this one, all heads side by side; at most 1."""
        return cosine(self.query.flatten(1), query.float().flatten(1))


@dataclass(frozen=True)
class Tally:
    """Of a SELECT layer that evicts, row by row. Never changed, as a `Memory`.

    worth: fp32 [rows, width, n], what the method keeps count of for each page; 0 for a page that nothing is known of.
    dropped: bool [rows, width], pages that are gone for good. steps: int32 [rows], decode steps so far.
    """

    BY_PAGE: ClassVar[tuple[str, ...]] = ("worth", "dropped")
    BY_ROW: ClassVar[tuple[str, ...]] = ("steps",)

    worth: Tensor
    dropped: Tensor
    steps: Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """fp32 [rows] of two [rows, n]; at most 1. A product of sums, so that no row's bits know its neighbours."""
    norms = (a * a).sum(-1) * (b * b).sum(-1)
    return ((a * b).sum(-1) / norms.sqrt().clamp_min(1e-30)).clamp_max(1.0)
