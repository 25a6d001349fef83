"""A profile that nobody measured, for tests that need one."""

from __future__ import annotations

from typing import Any

from deltakv.offload.profile import Profile, Timing
from deltakv.offload.scheduler import LayerShape

#: Multi-head, as in the tiny OPT of the tests.
SHAPE = LayerShape(hidden=64, kv_heads=4, head_dim=16, element_bytes=4)


def profile(**changes: Any) -> Profile:
    """A machine with a bus of 1 GB/s and a GPU of 1 TFLOP/s."""
    made: dict[str, Any] = {
        "machine": "made up",
        "dtype": "float32",
        "shape": (SHAPE.hidden, SHAPE.kv_heads, SHAPE.head_dim),
        "recompute": (Timing(1, 1e-7), Timing(1_000, 1_000 * SHAPE.phi / 1e12)),
        "attention": (Timing(1, 1e-8), Timing(1_000, 1e-7)),
        "rest": (Timing(1, 1e-6), Timing(64, 1e-6)),
    }
    for name in ("to_device", "to_host", "to_device_pageable", "to_host_pageable"):
        made[name] = (Timing(1_000, 1e-6), Timing(1_000_000, 1e-3))
    return Profile(**{**made, **changes})
