"""Times of a layer's attention on a GPU: what is timed can be captured as graphs. How long it takes is not asserted."""

from __future__ import annotations

import pytest
import torch

from deltakv.bench.layer_times import LayerTimes, measure_layer_times, pick_sizes
from deltakv.bench.op import Shape
from deltakv.config import Delta

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("batch", [1, 8])
def test_every_role_is_timed(batch: int) -> None:
    shape = Shape(batch, 2000, 14, 2, 64, torch.bfloat16, torch.device("cuda"))
    base = Delta(budget=512, recent=128, sinks=16, min_context=0)
    times = measure_layer_times(shape, base, (1600, 2000), runs=3, warmup=1)
    assert [tokens for tokens, _ in times.full] == [tokens for tokens, _ in times.select] == [1600, 2000]
    assert [tokens for tokens, _ in times.reuse] == pick_sizes(1600, 16)
    assert all(ms > 0 for points in (times.full, times.select, times.reuse) for _, ms in points)
    assert LayerTimes.load(times.numbers()) == times
