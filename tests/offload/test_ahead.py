"""Page-locked memory that torch keeps counts as free, and memory that a machine brings late is waited for."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

import deltakv
from deltakv.offload import ahead, memory
from deltakv.offload.memory import HostMemory, Records

SLAB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs that nobody page-locks, and an empty pool."""
    monkeypatch.setattr(memory, "SLAB_BYTES", SLAB)
    monkeypatch.setattr(memory, "POOLED", Counter())
    empty = memory.torch.empty
    monkeypatch.setattr(memory.torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))


class Growing:
    """A machine with `free` bytes, that brings `more` after `waits` waits below `floor`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, floor: int, waits: int, more: int) -> None:
        self.free, self.floor, self.waits, self.more, self.waited = free, floor, waits, more, 0
        monkeypatch.setattr(memory, "available_bytes", lambda: self.free)
        slab = HostMemory.slab

        def taking(host: HostMemory, nbytes: int) -> object:
            if not memory.POOLED[nbytes]:
                self.free -= nbytes
            assert self.free >= 0, "the machine would have killed us"
            return slab(host, nbytes)

        monkeypatch.setattr(HostMemory, "slab", taking)

    def wait(self, seconds: float) -> None:
        self.waited += 1
        if self.waited >= self.waits and self.free - SLAB < self.floor:
            self.free, self.more = self.free + self.more, 0


@pytest.mark.parametrize("floor", [least for least, _ in ahead.FLOORS])
def test_a_machine_that_brings_more_when_little_is_left(monkeypatch: pytest.MonkeyPatch, floor: int) -> None:
    heard: list[str] = []
    machine = Growing(monkeypatch, floor + 3 * SLAB, floor, 3, 100 * SLAB)
    ahead.page_lock(20 * SLAB, wait=machine.wait, say=heard.append)
    assert machine.waited >= 3 and memory.pooled_bytes() == 20 * SLAB
    assert bool(heard) == (machine.more == 0 and floor + 3 * SLAB < 20 * SLAB)


def test_a_machine_that_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Growing(monkeypatch, (256 << 20) + 5 * SLAB, 0, 10**9, 0)
    with pytest.raises(deltakv.OffloadError, match=r"after .* the host has .* left and brings no more"):
        ahead.page_lock(1 << 30, wait=machine.wait)
    assert memory.pooled_bytes() == 5 * SLAB


def test_what_torch_keeps_is_there_for_the_next_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)
    ahead.page_lock(20 * SLAB)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * SLAB)
    host = HostMemory(pinned=True)
    host.check(22 * SLAB, "a cache")
    with pytest.raises(deltakv.OffloadError, match="out of host memory"):
        host.check(23 * SLAB, "a cache")
    records = Records(host, 1, 1 << 10)
    records.ensure(20 * SLAB >> 10)
    assert memory.pooled_bytes() == 0
    records.release()
    assert memory.pooled_bytes() == 20 * SLAB
    with pytest.raises(deltakv.OffloadError, match="out of host memory"):
        HostMemory(pinned=False).check(3 * SLAB, "what is not page-locked")


def test_a_cache_that_is_dropped_gives_its_slabs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(HostMemory(pinned=True), 1, 1 << 10)
    records.ensure(3 * SLAB >> 10)
    assert memory.pooled_bytes() == 0
    del records
    gc.collect()
    assert memory.pooled_bytes() > 0


@pytest.mark.parametrize("record", [48, 16384, 8208, 3 * SLAB])
@pytest.mark.parametrize("tokens", [100_000, 4000])
def test_what_long_rows_take_is_known_ahead(record: int, tokens: int) -> None:
    if record * tokens < 10 * SLAB or record * tokens > 1 << 31:
        pytest.skip("neither long nor short enough")
    monkeypatched = Records(HostMemory(pinned=False), 1, record)
    monkeypatched.ensure(tokens)
    assert monkeypatched.nbytes <= memory.slabs_bytes(record, tokens) <= monkeypatched.nbytes + 2 * max(SLAB, 4 * SLAB)
