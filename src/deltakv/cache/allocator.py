"""Which pages of the pool are free, and how often each is shared."""

from __future__ import annotations

import numpy as np


class PageAllocator:
    """Reference counts for `n_pages` pages. Pages that rows share (beams) are freed with their last user.

    Prefers runs of neighbouring pages, because a row in one run is read in place (`ops/decode_attention/flash.py`).
    """

    def __init__(self, n_pages: int = 0) -> None:
        self._users = np.zeros(n_pages, dtype=np.int32)

    @property
    def n_pages(self) -> int:
        return len(self._users)

    @property
    def n_used(self) -> int:
        """Pages with at least one user."""
        return int(np.count_nonzero(self._users))

    def take(self, count: int) -> list[int] | None:
        """`count` free neighbouring pages with one user each, or None if there is no such run."""
        edges = np.diff(np.concatenate([[1], self._users != 0, [1]]).astype(np.int8))
        starts, ends = np.flatnonzero(edges == -1), np.flatnonzero(edges == 1)
        fitting = np.flatnonzero(ends - starts >= count)
        return self._claim(int(starts[fitting[0]]), count) if len(fitting) else None

    def take_after(self, page: int, count: int) -> list[int] | None:
        """The `count` pages that follow `page`, if all are free."""
        run = self._users[page + 1 : page + 1 + count]
        return self._claim(page + 1, count) if len(run) == count and not run.any() else None

    def share(self, pages: list[int]) -> None:
        """One more user for each of `pages`."""
        np.add.at(self._users, np.asarray(pages, dtype=np.int64), 1)

    def release(self, pages: list[int]) -> None:
        """One user less for each of `pages`; those without users are free."""
        np.subtract.at(self._users, np.asarray(pages, dtype=np.int64), 1)
        assert (self._users >= 0).all(), "a page was released more often than it was taken"

    def is_shared(self, page: int) -> bool:
        return bool(self._users[page] > 1)

    def _claim(self, first: int, count: int) -> list[int]:
        self._users[first : first + count] = 1
        return list(range(first, first + count))
