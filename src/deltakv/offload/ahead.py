"""Page-locks host memory ahead of its use: at leisure, on machines too whose memory grows only as it is used.

A microVM may start with a part of its memory, and get the rest when that is nearly full: `MemTotal` grows. Whoever asks
at once for more than there is seems to ask in vain. So slabs are taken one after the other, and where little is left
the machine gets time to bring more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from deltakv.errors import OffloadError
from deltakv.offload import memory
from deltakv.offload.memory import HostMemory, gibibytes

#: What is to stay free, and seconds to wait for it, from one to the next: a machine may bring more only when it has to.
FLOORS = ((4 << 30, 10.0), (1 << 30, 10.0), (256 << 20, 5.0))


def page_lock(
    nbytes: int,
    slab_bytes: int | None = None,
    *,
    wait: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = print,
) -> float:
    """Takes slabs of `nbytes` in all and gives them back, for the next cache to take. Returns the seconds that took.

    slab_bytes: of each, a power of two, because torch rounds up to them; None for those of a cache in host memory.
    wait: sleeps. say: hears of a machine's growth.
    Raises `OffloadError` if the machine has no such memory.
    """
    size = memory.SLAB_BYTES if slab_bytes is None else slab_bytes
    host, slabs = HostMemory(pinned=True), list[Tensor]()
    start, floor = time.perf_counter(), 0
    before = memory.available_bytes()
    try:
        for _ in range(-(-nbytes // size)):
            if not memory.POOLED[size]:
                floor = _await_room(floor, wait, size, nbytes, sum(slab.numel() for slab in slabs))
            slabs.append(host.slab(size))
        taken = time.perf_counter() - start
        if nbytes > before:
            say(f"the machine had {gibibytes(before)} free and has grown to hold {gibibytes(nbytes)}")
        return taken
    finally:
        host.release(slabs)


def _await_room(floor: int, wait: Callable[[float], None], size: int, nbytes: int, done: int) -> int:
    """Until a slab more leaves as much free as it should. Returns the number of the floor that has to do."""
    step = 0.1
    while True:
        least, patience = FLOORS[floor]
        while patience > 0:
            if memory.available_bytes() - size >= least:
                return floor
            wait(step)
            patience -= step
        if floor + 1 == len(FLOORS):
            raise OffloadError(
                f"out of host memory: {gibibytes(nbytes)} are needed, and after {gibibytes(done)} the host has "
                f"{gibibytes(memory.available_bytes())} left and brings no more; use fewer or shorter rows, or fewer "
                "layers"
            )
        floor += 1
