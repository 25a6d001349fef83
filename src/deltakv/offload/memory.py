"""Host memory: page-locked slabs, and the sequences of records that lie in them."""

from __future__ import annotations

import bisect
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltakv.errors import OffloadError

#: The largest slab: as large as a copy must be for the bus to be at its best, and no larger, because each layer of each
#: cache wastes half of one. The first ones are smaller, so that a short row does not take much.
SLAB_BYTES = 16 << 20
LEAST_SLAB_BYTES = 1 << 16


#: Page-locked slabs that were given back, by their bytes: torch keeps them, so the system does not count them as free.
POOLED: Counter[int] = Counter()


class HostMemory:
    """Hands out slabs of host memory, and refuses what is not there.

    pinned: page-locked. limit: bytes that all slabs together may take, or None for what the system has free.
    """

    def __init__(self, *, pinned: bool, limit: int | None = None) -> None:
        self.pinned, self.limit = pinned, limit
        self.taken = 0
        self._sizes: Counter[int] = Counter()
        if pinned:  # a cache that is dropped gives its slabs back too
            weakref.finalize(self, POOLED.update, self._sizes)

    def check(self, nbytes: int, what: str) -> None:
        """Raises `OffloadError` if `nbytes` more are not to be had. what: what they are for, in words."""
        room = available_bytes() + (pooled_bytes() if self.pinned else 0)
        if self.limit is not None:
            room = min(room, self.limit - self.taken)
        if nbytes > room:
            bound = "limit_mib allows" if self.limit is not None else "the host has free"
            raise OffloadError(
                f"out of host memory: {what} needs {gibibytes(nbytes)} more, and {bound} {gibibytes(max(room, 0))}; "
                "use fewer or shorter rows, deltakv.Host(bits=8), or a host with more memory"
            )

    def slab(self, nbytes: int) -> Tensor:
        """uint8 [nbytes]. Raises `OffloadError` if there is no room or it cannot be page-locked."""
        if not (self.pinned and POOLED[nbytes] and self.limit is None):
            self.check(nbytes, "a slab")
        try:
            with torch.inference_mode(False):  # made in inference mode, it could not be written outside of it
                slab = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            if self.pinned:
                raise OffloadError(
                    f"the system refuses to page-lock {gibibytes(nbytes)} of host memory ({said}); free some, raise "
                    "the limit (ulimit -l), or use deltakv.Host(pinned=False), whose copies are slow"
                ) from None
            raise OffloadError(f"out of host memory: {gibibytes(nbytes)} were refused ({said})") from None
        self.taken += nbytes
        if self.pinned:
            self._sizes[nbytes] += 1
            POOLED[nbytes] = max(POOLED[nbytes] - 1, 0)
        return slab

    def release(self, slabs: list[Tensor]) -> None:
        """These slabs are no longer used; torch keeps page-locked ones for the next of the same size."""
        self.taken -= sum(slab.numel() for slab in slabs)
        if self.pinned:
            sizes = Counter(slab.numel() for slab in slabs)
            self._sizes.subtract(sizes)
            POOLED.update(sizes)


def device_memory(count: int, nbytes: int, device: torch.device) -> list[Tensor]:
    """`count` chunks of `nbytes` on the device, uint8. Raises `OffloadError` if it has not that much."""
    try:
        with torch.inference_mode(False):  # made in inference mode, they could not be written outside of it
            return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
    except (RuntimeError, TypeError, OverflowError) as error:  # a number that torch cannot hold is a TypeError
        said = " ".join(str(error).split())[:200]
        raise OffloadError(
            f"{count} chunks of {gibibytes(nbytes)} do not fit on {device} ({said}); use smaller or fewer ones "
            "(chunk_mib, chunks), or fewer rows, whose tokens a chunk must hold"
        ) from None


class Records:
    """What one layer stores of each token: [tokens, rows, record] bytes, row beside row and token behind token.

    So all rows of a token range lie in one piece and cross the bus in one copy. A row's tokens count from its first
    real one; a shorter row's places beyond its end hold nothing.
    """

    def __init__(self, memory: HostMemory, rows: int, record: int) -> None:
        self.rows, self.record = rows, record
        self._memory = memory
        self._slabs: list[Tensor] = []
        self._starts: list[int] = []  # the first token of each slab
        self.capacity = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of all rows."""
        return self.rows * self.record

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.numel() for slab in self._slabs)

    def missing(self, tokens: int) -> int:
        """Bytes to take before there is room for `tokens` tokens, but for rounding."""
        return max(0, tokens - self.capacity) * self.token_bytes

    def ensure(self, tokens: int) -> None:
        """Makes room for `tokens` tokens. Raises `OffloadError`, with the room that there was still there."""
        while self.capacity < tokens:
            wanted = max(self.missing(tokens), min(self.nbytes, SLAB_BYTES), LEAST_SLAB_BYTES)
            # Powers of two, because torch's allocator of page-locked memory rounds up to them.
            size = max(min(_power_of_two(wanted), SLAB_BYTES), _power_of_two(self.token_bytes))
            self._slabs.append(self._memory.slab(size))
            self._starts.append(self.capacity)
            self.capacity += size // self.token_bytes

    def parts(self, start: int, stop: int) -> list[Tensor]:
        """The tokens [start, stop), in order, as views of uint8 [tokens, rows, record]: one for each slab."""
        assert 0 <= start <= stop <= self.capacity
        result = []
        while start < stop:
            index = bisect.bisect_right(self._starts, start) - 1
            first = start - self._starts[index]
            room = self._slabs[index].numel() // self.token_bytes
            count = min(stop - start, room - first)
            part = self._slabs[index][first * self.token_bytes : (first + count) * self.token_bytes]
            result.append(part.view(count, self.rows, self.record))
            start += count
        return result

    def empty_like(self, rows: int) -> Records:
        """Records of the same size for that many rows, with no room yet."""
        return Records(self._memory, rows, self.record)

    def reorder(self, indices: list[int], tokens: int) -> None:
        """Row i becomes row `indices[i]`, of as many rows, up to `tokens` tokens: in place."""
        chosen = torch.tensor(indices)
        for part in self.parts(0, tokens):
            part.copy_(part.index_select(1, chosen))

    def become(self, new: Records, indices: list[int], tokens: int) -> None:
        """Row i becomes row `indices[i]`, up to `tokens` tokens, in the memory of `new`, which has room for them; what
        these had is given back."""
        chosen, done = torch.tensor(indices), 0
        for source in self.parts(0, tokens):
            for target in new.parts(done, done + len(source)):
                target.copy_(source[: len(target)].index_select(1, chosen))
                source, done = source[len(target) :], done + len(target)
        self.release()
        self.rows, self._slabs, self._starts, self.capacity = new.rows, new._slabs, new._starts, new.capacity

    def release(self) -> None:
        self._memory.release(self._slabs)
        self._slabs, self._starts, self.capacity = [], [], 0


def take_room(wanted: Sequence[tuple[Records, int]]) -> None:
    """Room for that many tokens in each of these empty records, or in none. Raises `OffloadError`."""
    try:
        for records, tokens in wanted:
            records.ensure(tokens)
    except OffloadError:
        for records, _ in wanted:
            records.release()
        raise


def pooled_bytes() -> int:
    """Page-locked bytes that torch keeps of slabs that were given back."""
    return sum(size * count for size, count in POOLED.items())


def empty_pool() -> None:
    """Gives the system back what torch keeps of page-locked memory, the slabs that were given back among it."""
    POOLED.clear()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # what copies still read is not given back
        torch._C._host_emptyCache()


def slabs_bytes(token_bytes: int, tokens: int) -> int:
    """Bytes of the slabs that long rows of `tokens` tokens take, with that many bytes a token."""
    size = max(SLAB_BYTES, _power_of_two(token_bytes))
    return -(-tokens // (size // token_bytes)) * size


def available_bytes() -> int:
    """Memory that can be had without swapping: what Linux says, and what is left of a container's limit."""
    room = 1 << 62
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            room = int(line.split()[1]) * 1024
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        cache = sum(
            int(line.split()[1]) for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("inactive_file ")
        )
        room = min(room, int(limit[0]) - int(used[0]) + cache)
    return max(room, 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _power_of_two(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length()


def gibibytes(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 1 << 27 else f"{nbytes / 2**20:,.2f} MiB"
