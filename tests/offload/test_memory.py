"""Host memory: records in slabs, and refusals that leave what there was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltakv
from deltakv.offload import memory
from deltakv.offload.memory import HostMemory, Records


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLAB_BYTES", 1024)
    monkeypatch.setattr(memory, "LEAST_SLAB_BYTES", 128)


def filled(rows: int, record: int, tokens: int) -> tuple[Records, torch.Tensor]:
    """Records of `tokens` tokens, and what they hold."""
    records = Records(HostMemory(pinned=False), rows, record)
    records.ensure(tokens)
    content = torch.randint(0, 256, (tokens, rows, record), dtype=torch.uint8)
    done = 0
    for part in records.parts(0, tokens):
        part.copy_(content[done : done + len(part)])
        done += len(part)
    return records, content


@given(st.integers(1, 4), st.integers(1, 400), st.integers(0, 60), st.data())
def test_parts_are_the_tokens_in_order(rows: int, record: int, tokens: int, data: Any) -> None:
    records, content = filled(rows, record, tokens)
    start = data.draw(st.integers(0, tokens))
    stop = data.draw(st.integers(start, tokens))
    parts = records.parts(start, stop)
    assert torch.equal(torch.cat([content[:0], *parts]), content[start:stop])
    assert all(part.is_contiguous() for part in parts)


def test_growth_keeps_what_there_was_and_copies_nothing() -> None:
    records, content = filled(2, 10, 9)
    where = records.parts(0, 9)[0].data_ptr()
    records.ensure(500)
    assert records.parts(0, 9)[0].data_ptr() == where
    assert torch.equal(torch.cat(records.parts(0, 9)), content)


def test_a_short_row_takes_little_and_a_long_one_large_slabs() -> None:
    short, long = (Records(HostMemory(pinned=False), 1, 16) for _ in range(2))
    short.ensure(1)
    assert short.nbytes == 128
    long.ensure(100)
    assert long.nbytes == 2048
    assert len(long.parts(0, 128)) == 2


def test_as_many_rows_change_places_where_they_are() -> None:
    records, content = filled(3, 20, 40)
    before = [part.data_ptr() for part in records.parts(0, 40)]
    records.reorder([2, 2, 0], 37)
    assert torch.equal(torch.cat(records.parts(0, 40)), torch.cat([content[:37, [2, 2, 0]], content[37:]]))
    assert [part.data_ptr() for part in records.parts(0, 40)] == before


def test_other_rows_in_other_memory() -> None:
    records, content = filled(3, 20, 40)
    new = records.empty_like(5)
    new.ensure(37)
    room = new.nbytes
    records.become(new, [2, 2, 0, 1, 2], 37)
    assert torch.equal(torch.cat(records.parts(0, 37)), content[:37, [2, 2, 0, 1, 2]])
    assert records.rows == 5 and records.nbytes == room == records._memory.taken


def test_what_is_released_may_be_taken_again() -> None:
    host = HostMemory(pinned=False, limit=4096)
    for _ in range(20):
        records = Records(host, 1, 100)
        records.ensure(25)
        records.release()
    assert host.taken == 0


def test_over_the_limit() -> None:
    records = Records(HostMemory(pinned=False, limit=3000), 1, 100)
    records.ensure(20)
    capacity = records.capacity
    with pytest.raises(deltakv.OffloadError, match=r"out of host memory.*limit_mib allows.*bits=8"):
        records.ensure(10_000)
    assert records.capacity >= capacity
    assert records.parts(0, 20)


def test_over_what_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 5 << 30)
    with pytest.raises(deltakv.OffloadError, match=r"32 layers needs 6\.00 GiB more, and the host has free 5\.00 GiB"):
        HostMemory(pinned=False).check(6 << 30, "32 layers")


def test_available_memory_is_known() -> None:
    assert 1 << 20 < memory.available_bytes() < 1 << 50


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error: out of memory")


def test_pinning_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostMemory(pinned=True)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(deltakv.OffloadError, match=r"refuses to page-lock.*ulimit -l.*pinned=False"):
        host.slab(4096)
    assert host.taken == 0


def test_memory_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(deltakv.OffloadError, match=r"out of host memory: 0\.00 MiB were refused"):
        HostMemory(pinned=False).slab(4096)
