"""Shares by length bucket: near the best at every length of the bucket, and never above what `most` promises."""

from __future__ import annotations

import itertools

import pytest

from deltakv.offload.planner import FixedShare, Planner, bucket_end, bucket_ends
from deltakv.offload.scheduler import LayerShape, Rates, Schedule, best_split, predict

OPT = LayerShape(hidden=4096, kv_heads=32, head_dim=128, element_bytes=2)
QWEN = LayerShape(hidden=3584, kv_heads=4, head_dim=128, element_bytes=2)


def rates(shape: LayerShape, batch: int, length: int) -> Rates:
    """The rest of a layer takes longer for longer rows, but not in proportion."""
    return Rates(bus=5e10, gemm=4.5e14, other=2e-4 + batch * length * 1e-9)


@pytest.mark.parametrize("schedule", Schedule)
def test_near_the_best_at_every_length(schedule: Schedule) -> None:
    planner = Planner([OPT], rates, schedule)
    for length in (700, 1000, 1024, 1500, 2048, 5000):
        tokens = planner.tokens(0, 8, length)
        exact = best_split(OPT, rates(OPT, 8, length), 8, length, schedule)
        taken = predict(OPT, rates(OPT, 8, length), 8, length, tokens, schedule)
        assert exact.parts.total <= taken.total <= 1.1 * exact.parts.total


def test_most_is_the_most() -> None:
    planner = Planner([OPT], rates, Schedule.PIPELINED)
    for longest in (1, 30, 200, 1000):
        assert planner.most(0, 8, longest) >= max(planner.tokens(0, 8, length) for length in range(1, longest + 1))


def test_layers_have_splits_of_their_own() -> None:
    planner = Planner([OPT, QWEN], rates, Schedule.PIPELINED)
    assert planner.tokens(0, 8, 2000) > 0
    assert planner.tokens(1, 8, 2000) == planner.most(1, 8, 2000) == 0


def test_nothing_of_nothing() -> None:
    assert Planner([OPT], rates, Schedule.PIPELINED).tokens(0, 8, 0) == 0


def test_a_fixed_share() -> None:
    fixed = FixedShare(0.5, Schedule.SERIAL)
    assert [fixed.tokens(0, 1, length) for length in (0, 1, 7, 100)] == [0, 0, 3, 50]
    assert fixed.most(0, 1, 100) == 50


def test_buckets() -> None:
    assert list(itertools.islice(bucket_ends(), 6)) == [16, 24, 32, 48, 64, 96]
    assert [bucket_end(length) for length in (1, 16, 17, 33, 2048, 2049)] == [16, 16, 24, 48, 2048, 3072]
