"""Attention masks to rows without padding.

transformers counts columns: position j of a padded batch. The pool counts a row's real tokens. `Columns` remembers
which columns hold one, so that a mask can be checked against what is stored, and new tokens find their row.

That is looked at several times before every step that the host lays out, and is small; so it is in numpy, which does it
at once in the thread that asks. torch would share each look out among all cores, and wait for the last of them:
measured, 8 ms at 32 x 8,192 columns on a machine that had other work too. (A mask that is given is made bool by torch,
once, where it lies.)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from deltakv.errors import MaskError


class Columns:
    """Which columns of the padded batch hold a stored token: `real`, bool [batch, seen]."""

    def __init__(self, real: NDArray[np.bool_]) -> None:
        self.real = real

    @classmethod
    def none(cls, batch: int) -> Columns:
        """Before anything is stored."""
        return cls(np.zeros((batch, 0), dtype=np.bool_))

    @property
    def seen(self) -> int:
        """Columns so far, padding included: what transformers calls the cache's length."""
        return self.real.shape[1]

    def counts(self) -> list[int]:
        """Real tokens a row."""
        return [int(np.count_nonzero(row)) for row in self.real]

    def are_real(self) -> bool:
        """Whether all columns of all rows hold a token."""
        return bool(self.real.all())

    def extended(self, mask: Tensor | None, width: int) -> tuple[Columns, Tensor]:
        """The columns after a step of `width` new ones, and which of those are real, bool [batch, width].

        mask: [batch, seen + width], 1 for a real token, or None for no padding at all. Stored tokens at a row's end
        may be hidden from now on (a finished row was fed padding): they are dropped, and the gap is not stored.
        Raises `MaskError` for any other hole, and for a mask that shows what was never stored.
        """
        batch, seen = self.real.shape
        if mask is None:
            if not self.are_real():
                raise MaskError(
                    "no attention_mask was given, but earlier turns of this batch had padding, before a row or after "
                    "it had finished; "
                    f"pass the mask of all {seen + width} columns"
                )
            return Columns(np.ones((batch, seen + width), dtype=np.bool_)), torch.ones((batch, width), dtype=torch.bool)
        if mask.ndim != 2:
            raise MaskError(
                f"attention_mask has {mask.ndim} dimensions; only a 2-D mask of padding, [batch, length], is supported"
            )
        if mask.shape != (batch, seen + width):
            raise MaskError(
                f"attention_mask has shape {list(mask.shape)}, but the cache holds {seen} columns and {width} are new: "
                f"it must be [{batch}, {seen + width}] and cover all turns"
            )
        shown = mask.ne(0).cpu().numpy()
        old, new = shown[:, :seen], shown[:, seen:]
        if not np.array_equal(old, self.real):
            self._check_dropped(old)
        starts = new[:, 1:] & ~new[:, :-1]
        if holes := _rows(starts.sum(1) + new[:, 0] > 1):
            raise MaskError(
                f"attention_mask has a hole among the new tokens of row {holes[0]}; "
                "real tokens must stand together, with padding before or after them"
            )
        return Columns(shown), torch.tensor(new)

    def grown(self, lengths: list[int], seen: int) -> Columns:
        """With the columns up to `seen`, of which each row's first are real, until it has `lengths[r]` tokens."""
        new = np.array(lengths) - np.array(self.counts())
        return Columns(np.concatenate([self.real, np.arange(seen - self.seen) < new[:, None]], axis=1))

    def cropped(self, columns: int) -> Columns:
        """Without the last `columns` columns."""
        return Columns(self.real[:, : max(self.seen - columns, 0)])

    def rearranged(self, indices: list[int]) -> Columns:
        """New row i is old row `indices[i]`."""
        return Columns(self.real[indices])

    def _check_dropped(self, old: NDArray[np.bool_]) -> None:
        """Stored tokens may only disappear from a row's end, and nothing may appear."""
        if appeared := _rows((old & ~self.real).any(1)):
            raise MaskError(
                f"attention_mask shows tokens of row {appeared[0]} that were padding when they were stored "
                "(also what a row is fed after it has finished); pass the mask of the earlier turns unchanged, "
                "and 0 for the padding behind finished rows"
            )
        dropped = self.real & ~old
        # Once a stored token is hidden, all stored ones after it must be hidden too.
        after = np.logical_or.accumulate(dropped, axis=1)
        if holes := _rows((after & old).any(1)):
            raise MaskError(
                f"attention_mask has a hole in row {holes[0]}: it hides stored tokens that others follow; "
                "only the end of a row may be dropped"
            )


def _rows(which: ArrayLike) -> list[int]:
    """The numbers of the rows of which it is true."""
    return [int(row) for row in np.flatnonzero(which)]
