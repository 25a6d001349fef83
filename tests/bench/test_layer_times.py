"""Times of a layer's attention: what is timed, and what is made of it. The clock itself is never believed here."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch

from deltakv.bench import layer_times
from deltakv.bench.clock import Times
from deltakv.bench.layer_times import LayerTimes, measure_layer_times, pick_sizes
from deltakv.bench.op import Shape
from deltakv.config import Delta
from deltakv.ops import decode_attention

SHAPE = Shape(2, 200, 4, 2, 16, torch.float32, torch.device("cpu"))
BASE = Delta(budget=64, recent=16, sinks=16, min_context=0)


def test_more_to_read_never_takes_less() -> None:
    times = LayerTimes.of({100: 2.0, 200: 1.5}, {100: 1.0, 200: 4.0}, {64: 0.5, 32: 0.75, 128: 1.0})
    assert times.full == ((100, 2.0), (200, 2.0)) and times.select == ((100, 2.0), (200, 4.0))
    assert times.reuse == ((32, 0.75), (64, 0.75), (128, 1.0))
    assert LayerTimes.load(json.loads(json.dumps(times.numbers()))) == times


def test_a_step_is_the_sum_of_its_layers_between_the_points() -> None:
    times = LayerTimes.of({100: 2.0, 200: 4.0}, {100: 3.0, 200: 5.0}, {32: 0.5, 64: 0.5, 128: 1.5})
    assert times.step(2, 3, 4, 150, 96) == 2 * 3.0 + 3 * 4.0 + 4 * 1.0
    assert times.step(1, 0, 0, 300, 0) == 4.0 and times.step(0, 0, 1, 0, 16) == 0.5


@pytest.mark.parametrize("length", [32, 40, 500, 8000, 131072])
def test_sizes_reach_from_two_pages_to_the_row(length: int) -> None:
    sizes = pick_sizes(length, 16)
    assert sizes[0] == 32 and sizes[-1] == length // 16 * 16 and sizes == sorted({*sizes})
    assert all(after <= 2 * before for before, after in pairwise(sizes))
    assert len(sizes) < 30


def test_each_role_is_timed_at_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a count of the tokens that the op was shown; what it gave is held against full attention."""
    seen: list[Any] = []

    def attending(q: Any, k: Any, v: Any, table: Any, lens: Any, scale: float) -> Any:
        seen.append(int(lens[0, 0]))
        assert table.shape[2] * 16 >= seen[-1] and len({*table.flatten().tolist()}) == table.numel()
        return decode_attention(q, k, v, table, lens, scale)

    def clock(run: Any, pools: Any, device: Any, runs: int, warmup: int, before: Any) -> Times:
        before()
        given = run(pools[0])
        if given.dtype == torch.int32:  # a pick as a block table: 64 tokens of each row, from its first page on
            assert given.shape == (2, 4) and (given[:, 0] == torch.tensor([0, 13])).all()
            return Times([1000.0])
        return Times([float(seen[-1])])

    monkeypatch.setattr(layer_times, "decode_attention", attending)
    monkeypatch.setattr(layer_times, "time_round", clock)
    told: list[int] = []
    times = measure_layer_times(SHAPE, BASE, (140, 200), advance=told.append)
    assert times.full == ((140, 140.0), (200, 200.0))
    assert times.select == ((140, 1000.0), (200, 1000.0))
    assert times.reuse == tuple((tokens, float(tokens)) for tokens in pick_sizes(140, 16))
    assert sum(told) == 4 + len(times.reuse)


def test_a_real_clock() -> None:
    times = measure_layer_times(SHAPE, BASE, (140, 200), runs=1, warmup=0)
    assert all(ms > 0 for points in (times.full, times.select, times.reuse) for _, ms in points)
