"""Who waits for whom: no copy overwrites what may still be read, and none reads what may not be there yet.

On a CPU the model's own lane does everything at once, so a wait that is missing there changes no number. These tests
look at the waits themselves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from deltakv.offload.lanes import Lanes, lanes_of
from deltakv.offload.loads import Load, Loads
from deltakv.offload.memory import HostMemory, Records
from deltakv.offload.pieces import Kind, Piece, pieces
from deltakv.offload.scheduler import Schedule
from deltakv.offload.stores import Places, Stores
from deltakv.offload.weights import HostWeights

NOWHERE = torch.device("cpu")


class Clock:
    """Numbers all events of all lanes, in the order in which the host queues them."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[tuple[str, int, Any]] = []

    def note(self, what: str, detail: Any = None) -> int:
        self.now += 1
        self.log.append((what, self.now, detail))
        return self.now


class NotingLane:
    """A lane that copies at once and notes what it does, and the latest moment of each lane that it has waited for."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name, self.clock = name, clock
        self.seen: dict[str, int] = {}

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)
        self.clock.note(f"{self.name} copy", (target.data_ptr(), source.data_ptr(), dict(self.seen)))

    def mark(self) -> Any:
        return self.name, self.clock.note(f"{self.name} mark")

    def wait(self, mark: Any) -> None:
        if mark is not None:
            lane, moment = mark
            self.seen[lane] = max(self.seen.get(lane, 0), moment)

    def settle(self) -> None:
        pass

    def keep(self, tensor: Tensor) -> None:
        pass


def noting() -> tuple[Clock, Lanes]:
    clock = Clock()
    return clock, Lanes(*(NotingLane(name, clock) for name in ("load", "store", "compute")))


def run_loads(schedule: Schedule, count: int) -> tuple[Clock, dict[int, list[int]]]:
    """A step of 3 layers through `count` chunks. Returns the log and, by chunk, the moments of its releases."""
    clock, lanes = noting()
    records = Records(HostMemory(pinned=False), 2, 16)
    records.ensure(40)
    for part in records.parts(0, 40):
        part.random_()
    whole = torch.cat(records.parts(0, 40))
    cut = pieces(40, 18, 5, 5, schedule)
    loads = Loads(lanes, NOWHERE, count, 5 * 32)
    stored = lanes.store.mark()
    jobs = [Load(n, p, lambda p=p: records.parts(p.start, p.stop), stored) for n in range(3) for p in cut]
    loads.start(jobs)
    releases: dict[int, list[int]] = {}
    for layer in range(3):
        for piece in cut:
            taken = loads.take(layer, piece)
            moment = clock.note("read", piece)
            assert torch.equal(taken, whole[piece.start : piece.stop])
            where = taken.data_ptr()
            loads.release()
            releases.setdefault(where, []).append(moment)
    assert len(releases) == min(count, len(jobs))
    return clock, releases


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_chunk_is_filled_again_only_behind_its_readers(schedule: Schedule, count: int) -> None:
    clock, releases = run_loads(schedule, count)
    for what, moment, detail in clock.log:
        if what == "load copy":
            target, _, seen = detail
            read = [at for at in releases[target] if at < moment]
            assert not read or seen["compute"] > read[-1]
            assert seen["store"] >= 1, "the host must have it"


@pytest.mark.parametrize("count", [2, 8])
def test_serial_x_crosses_behind_all_that_was_before(count: int) -> None:
    clock, _ = run_loads(Schedule.SERIAL, count)
    cut = pieces(40, 18, 5, 5, Schedule.SERIAL) * 3
    copies = [(moment, detail[2]) for what, moment, detail in clock.log if what == "load copy"]
    reads = [moment for what, moment, _ in clock.log if what == "read"]
    for index, (piece, (moment, seen)) in enumerate(zip(cut, copies, strict=True)):
        if piece.kind is Kind.X and index:
            assert moment > reads[index - 1], "queued before what it waits for"
            assert seen["compute"] > reads[index - 1]


@pytest.mark.parametrize("together", [1, 2, 3])
def test_a_round_s_x_is_all_there_before_any_is_read(together: int) -> None:
    clock, lanes = noting()
    records = Records(HostMemory(pinned=False), 1, 16)
    records.ensure(40)
    cut = pieces(40, 24, 4, 4, Schedule.SERIAL, together)
    loads = Loads(lanes, NOWHERE, 4, 4 * 16)
    loads.start([Load(0, p, lambda p=p: records.parts(p.start, p.stop), None) for p in cut])
    copied: list[int] = []
    for index, piece in enumerate(cut):
        loads.take(0, piece)
        copied = [moment for what, moment, _ in clock.log if what == "load copy"]
        needed = copied[index + piece.ahead]
        assert lanes.compute.seen["load"] > needed  # type: ignore[attr-defined]
        loads.release()
    assert len(copied) == len(cut)


def test_copies_run_ahead_of_the_layers() -> None:
    """Pipelined: as many pieces are under way as there are chunks, of the next layer too."""
    clock, _ = run_loads(Schedule.PIPELINED, 3)
    ahead = 0
    for what, _, _ in clock.log:
        ahead += {"load copy": 1, "read": -1}.get(what, 0)
        assert 0 <= ahead <= 3
    first = [what for what, _, _ in clock.log if what in ("load copy", "read")][:4]
    assert first == ["load copy"] * 3 + ["read"]


def test_a_new_step_forgets_what_was_queued() -> None:
    _, lanes = noting()
    records = Records(HostMemory(pinned=False), 1, 16)
    records.ensure(8)
    for part in records.parts(0, 8):
        part.random_()
    loads = Loads(lanes, NOWHERE, 2, 64)
    cut = (Piece(Kind.KV, 0, 4), Piece(Kind.KV, 4, 8))
    jobs = [Load(0, p, lambda p=p: records.parts(p.start, p.stop), None) for p in cut]
    loads.start(jobs)
    loads.take(0, cut[0])
    loads.start(jobs)
    assert torch.equal(loads.take(0, cut[0]), torch.cat(records.parts(0, 4)))


def test_an_unexpected_piece() -> None:
    _, lanes = noting()
    loads = Loads(lanes, NOWHERE, 2, 64)
    loads.start([])
    with pytest.raises(deltakv.OffloadError, match="layer 5 asked for its cache out of turn"):
        loads.take(5, Piece(Kind.KV, 0, 4))


def test_another_cache_s_piece() -> None:
    """Of caches that share chunks, whose pieces look alike."""
    _, lanes = noting()
    records = Records(HostMemory(pinned=False), 1, 16)
    records.ensure(4)
    loads, piece = Loads(lanes, NOWHERE, 2, 64), Piece(Kind.KV, 0, 4)
    loads.start([Load(0, piece, lambda: records.parts(0, 4), None, owner) for owner in ("one", "other")])
    with pytest.raises(deltakv.OffloadError, match="out of turn"):
        loads.take(0, piece, "other")
    loads.take(0, piece, "one")


@pytest.mark.parametrize(
    "places",
    [Places([0, 0], [9, 9], [0, 0]), Places([7, 7], [5, 3], [0, 2]), Places([7, 4], [1, 1], [0, 0])],
    ids=["a prompt", "padded", "one token each"],
)
def test_what_is_stored_is_copied_behind_what_made_it(places: Places) -> None:
    """And every token is in its place."""
    clock, lanes = noting()
    records = Records(HostMemory(pinned=False), 2, 16)
    records.ensure(20)
    width = max(f + c for f, c in zip(places.first, places.counts, strict=True))
    new = torch.randint(0, 256, (width, 2, 16), dtype=torch.uint8)
    stores = Stores(lanes, NOWHERE, 2 * 32)

    def encode(index: Any) -> Tensor:
        clock.note("made")
        return new[index]

    for _ in range(3):
        stores.write(records, places, 1 << 40, encode)
    made = 0
    for what, moment, detail in clock.log:
        if what == "made":
            made = moment
        elif what == "store copy":
            assert detail[2]["compute"] > made
    assert made
    whole = torch.cat(records.parts(0, 20))
    for row, (past, count, first) in enumerate(zip(places.past, places.counts, places.first, strict=True)):
        assert torch.equal(whole[past : past + count, row], new[first : first + count, row])


def test_weights_cross_behind_the_layer_whose_place_they_take() -> None:
    """And the layer's work waits for them."""
    clock, lanes = noting()
    layers = [[torch.nn.Parameter(torch.randn(30, 20)), torch.nn.Parameter(torch.randn(7))] for _ in range(5)]
    expected = [[weight.detach().clone() for weight in weights] for weights in layers]
    held = HostWeights(layers, lanes, HostMemory(pinned=False))
    loads = Loads(lanes, NOWHERE, 2, 64)
    ends: list[int] = []
    for step in range(2):  # the second one takes over the places of the first
        held.begin()
        loads.start(held.fetch(layer) for layer in range(5))
        for number, weights in enumerate(layers):
            held.wait(number)
            copies = [(moment, detail[2]) for what, moment, detail in clock.log if what == "load copy"]
            moment, seen = copies[5 * step + number]
            assert lanes.compute.seen["load"] > moment  # type: ignore[attr-defined]
            if len(ends) >= 2:
                assert moment > ends[-2] and seen["compute"] > ends[-2]
            assert all(torch.equal(one, other) for one, other in zip(weights, expected[number], strict=True))
            ends.append(clock.note("read"))
            held.end()
            loads.proceed()


def test_one_memory_needs_one_lane() -> None:
    lanes = lanes_of(NOWHERE)
    assert lanes.load is lanes.store is lanes.compute
    assert lanes.load.mark() is None
