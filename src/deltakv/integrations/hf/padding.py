"""Attention masks to rows without padding.

transformers counts columns: position j of a padded batch. The pool counts a row's real tokens. `Columns` remembers
which columns hold one, so that a mask can be checked against what is stored, and new tokens find their row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.errors import MaskError


class Columns:
    """Which columns of the padded batch hold a stored token: bool [batch, seen], on the CPU."""

    def __init__(self, batch: int) -> None:
        self.real = torch.zeros((batch, 0), dtype=torch.bool)

    @property
    def seen(self) -> int:
        """Columns so far, padding included: what transformers calls the cache's length."""
        return self.real.shape[1]

    def counts(self) -> list[int]:
        """Real tokens a row."""
        result: list[int] = self.real.sum(1).tolist()
        return result

    def extended(self, mask: Tensor | None, width: int) -> tuple[Columns, Tensor]:
        """The columns after a step of `width` new ones, and which of those are real, bool [batch, width].

        mask: [batch, seen + width], 1 for a real token, or None for no padding at all. Stored tokens at a row's end
        may be hidden from now on (a finished row was fed padding): they are dropped, and the gap is not stored.
        Raises `MaskError` for any other hole, and for a mask that shows what was never stored.
        """
        batch, seen = self.real.shape
        if mask is None:
            if not bool(self.real.all()):
                raise MaskError(
                    "no attention_mask was given, but earlier turns of this batch had padding, before a row or after "
                    "it had finished; "
                    f"pass the mask of all {seen + width} columns"
                )
            mask = torch.ones((batch, seen + width), dtype=torch.bool)
        if mask.ndim != 2:
            raise MaskError(
                f"attention_mask has {mask.ndim} dimensions; only a 2-D mask of padding, [batch, length], is supported"
            )
        if mask.shape != (batch, seen + width):
            raise MaskError(
                f"attention_mask has shape {list(mask.shape)}, but the cache holds {seen} columns and {width} are new: "
                f"it must be [{batch}, {seen + width}] and cover all turns"
            )
        mask = mask.to("cpu", torch.bool)
        old, new = mask[:, :seen], mask[:, seen:]
        if seen and not torch.equal(old, self.real):
            self._check_dropped(old)
        starts = new[:, 1:] & ~new[:, :-1]
        if holes := (starts.sum(1) + new[:, 0] > 1).nonzero().flatten().tolist():
            raise MaskError(
                f"attention_mask has a hole among the new tokens of row {holes[0]}; "
                "real tokens must stand together, with padding before or after them"
            )
        result = Columns(batch)
        result.real = mask
        return result, new

    def grown(self, lengths: list[int], seen: int) -> Columns:
        """With the columns up to `seen`, of which each row's first are real, until it has `lengths[r]` tokens."""
        new = torch.tensor(lengths) - self.real.sum(1)
        result = Columns(len(lengths))
        result.real = torch.cat([self.real, torch.arange(seen - self.seen) < new[:, None]], dim=1)
        return result

    def cropped(self, columns: int) -> Columns:
        """Without the last `columns` columns."""
        result = Columns(len(self.real))
        result.real = self.real[:, : max(self.seen - columns, 0)]
        return result

    def rearranged(self, indices: list[int]) -> Columns:
        """New row i is old row `indices[i]`."""
        result = Columns(len(indices))
        result.real = self.real[indices]
        return result

    def _check_dropped(self, old: Tensor) -> None:
        """Stored tokens may only disappear from a row's end, and nothing may appear."""
        if appeared := (old & ~self.real).any(1).nonzero().flatten().tolist():
            raise MaskError(
                f"attention_mask shows tokens of row {appeared[0]} that were padding when they were stored "
                "(also what a row is fed after it has finished); pass the mask of the earlier turns unchanged, "
                "and 0 for the padding behind finished rows"
            )
        dropped = self.real & ~old
        # Once a stored token is hidden, all stored ones after it must be hidden too.
        after = dropped.cumsum(1) > 0
        if holes := (after & old).any(1).nonzero().flatten().tolist():
            raise MaskError(
                f"attention_mask has a hole in row {holes[0]}: it hides stored tokens that others follow; "
                "only the end of a row may be dropped"
            )
