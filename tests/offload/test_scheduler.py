"""The scheduler against exhaustive search over every l, and against formulas written down anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltakv
from deltakv.offload.scheduler import ROW, Column, LayerShape, Rates, Schedule, best_split, predict

OPT_6_7B = LayerShape(hidden=4096, kv_heads=32, head_dim=128, element_bytes=2)
QWEN_7B = LayerShape(hidden=3584, kv_heads=4, head_dim=128, element_bytes=2)

shapes = st.builds(
    LayerShape,
    hidden=st.integers(1, 4096),
    kv_heads=st.integers(1, 32),
    head_dim=st.sampled_from([16, 64, 128]),
    element_bytes=st.sampled_from([2, 4]),
    kv_bytes=st.one_of(st.none(), st.integers(1, 40_000)),
)
rates = st.builds(
    Rates,
    bus=st.floats(1e6, 1e12),
    gemm=st.floats(1e9, 1e15),
    other=st.one_of(st.just(0.0), st.floats(1e-6, 0.1)),
    attention=st.one_of(st.just(0.0), st.floats(1e-9, 1e-4)),
)
columns = st.one_of(
    st.just(ROW),
    st.builds(Column, batches=st.integers(1, 6), first_bytes=st.integers(0, 10**9), rest_bytes=st.integers(0, 10**9)),
)


def brute(shape: LayerShape, rates: Rates, b: int, s: int, l: int, schedule: Schedule, column: Column) -> float:  # noqa: E741
    """The time as the issue and the paper write it, batch by batch."""
    x, kv = b * l * shape.alpha / rates.bus, b * (s - l) * shape.kappa / rates.bus
    recompute = b * l * 4 * shape.hidden * shape.kv_heads * shape.head_dim / rates.gemm
    beside = recompute + b * l * rates.attention
    gpu = sum(rates.other + recompute for _ in range(column.batches))
    weights = (column.first_bytes / rates.bus, column.rest_bytes / rates.bus)
    if schedule is Schedule.PIPELINED:
        return max(sum(weights) + sum(x + kv for _ in range(column.batches)), gpu)
    total = weights[0]
    for batch in range(column.batches):
        total += x + max(beside, kv + (weights[1] if batch == 0 else 0.0))
    return max(total, gpu)


@settings(max_examples=300)
@given(shapes, rates, st.integers(1, 64), st.integers(1, 300), st.sampled_from(Schedule), columns)
def test_no_other_l_is_faster(
    shape: LayerShape, rates: Rates, batch: int, length: int, schedule: Schedule, column: Column
) -> None:
    split = best_split(shape, rates, batch, length, schedule, column)
    times = [brute(shape, rates, batch, length, tokens, schedule, column) for tokens in range(length + 1)]
    assert split.parts.total <= min(times) * (1 + 1e-9)
    assert math.isclose(split.parts.total, times[split.tokens], rel_tol=1e-9)
    assert math.isclose(split.plain.total, times[0], rel_tol=1e-9)
    assert bool(split.reason) == (split.tokens == 0)


@given(rates, st.integers(1, 64), st.integers(1, 5000))
def test_the_paper_s_closed_form_for_multi_head_attention(rates: Rates, batch: int, length: int) -> None:
    """l = s*p*F / (2*d*P + p*F), as an integer in [0, s]; other work left out, as there."""
    rates = Rates(bus=rates.bus, gemm=rates.gemm)
    split = best_split(OPT_6_7B, rates, batch, length, Schedule.SERIAL)
    exact = length * 2 * rates.gemm / (2 * 4096 * rates.bus + 2 * rates.gemm)
    assert abs(split.tokens - exact) <= 1


@given(rates, st.integers(1, 64), st.integers(1, 5000))
def test_the_share_of_the_pipelined_schedule(rates: Rates, batch: int, length: int) -> None:
    """share = clip[(kappa/P - t_gpu/(b*s)) / (phi/F + (kappa - alpha)/P), 0, 1]."""
    shape = OPT_6_7B
    split = best_split(shape, rates, batch, length, Schedule.PIPELINED)
    share = (shape.kappa / rates.bus - rates.other / (batch * length)) / (
        shape.phi / rates.gemm + (shape.kappa - shape.alpha) / rates.bus
    )
    assert abs(split.tokens - min(max(share, 0.0), 1.0) * length) <= 1


@given(rates, st.integers(1, 64), st.integers(1, 2000), st.sampled_from(Schedule))
def test_grouped_query_attention_moves_everything_and_says_why(
    rates: Rates, batch: int, length: int, schedule: Schedule
) -> None:
    split = best_split(QWEN_7B, rates, batch, length, schedule)
    assert split.tokens == 0
    assert "grouped-query attention: K and V of a token are 2,048 bytes and X is 7,168" in split.reason
    assert split.parts == split.plain


def test_a_quantised_cache_may_be_too_small_for_x() -> None:
    shape = LayerShape(hidden=4096, kv_heads=32, head_dim=128, element_bytes=2, kv_bytes=4096)
    split = best_split(shape, Rates(bus=5e10, gemm=4e14), 32, 2048, Schedule.PIPELINED)
    assert (split.tokens, split.reason.split(":")[0]) == (0, "a quantised cache")


def test_a_gpu_that_is_too_slow_says_so() -> None:
    split = best_split(OPT_6_7B, Rates(bus=5e10, gemm=4e14, other=1.0), 32, 2048, Schedule.PIPELINED)
    assert split.tokens == 0
    assert "the rest of the layer takes the GPU longer than the bus" in split.reason
    slow = best_split(OPT_6_7B, Rates(bus=5e10, gemm=1e11), 32, 2048, Schedule.PIPELINED)
    assert slow.tokens == 0 and "GPU would take longer to recompute even one token" in slow.reason


@pytest.mark.parametrize(
    ("gemm", "serial", "pipelined"), [(650e12, 1.59, 2.0), (450e12, 1.5, 2.0), (360e12, 1.44, 1.8)]
)
def test_what_a_bus_of_55_gb_s_allows(gemm: float, serial: float, pipelined: float) -> None:
    """OPT-6.7B dims, batch 32 at 2k tokens: the bounds on an H200 by the rate at which it recomputes."""
    rates = Rates(bus=55e9, gemm=gemm)
    assert best_split(OPT_6_7B, rates, 32, 2048, Schedule.SERIAL).speedup == pytest.approx(serial, abs=0.01)
    assert best_split(OPT_6_7B, rates, 32, 2048, Schedule.PIPELINED).speedup == pytest.approx(pipelined, abs=0.01)


@pytest.mark.parametrize("schedule", Schedule)
def test_weights_on_the_bus_shift_the_best_l(schedule: Schedule) -> None:
    """Column by column the bus has more to do, so more is recomputed; several batches share the weights."""
    rates = Rates(bus=5e10, gemm=1e14)
    column = Column(batches=4, first_bytes=2 * 5120 * 5120 * 2, rest_bytes=10 * 5120 * 5120 * 2)
    row = best_split(OPT_6_7B, rates, 16, 1024, schedule)
    several = best_split(OPT_6_7B, rates, 16, 1024, schedule, column)
    assert several.tokens >= row.tokens
    assert several.parts.total < 4 * best_split(OPT_6_7B, rates, 16, 1024, schedule, Column(
        batches=1, first_bytes=column.first_bytes, rest_bytes=column.rest_bytes
    )).parts.total  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerShape(hidden=0, kv_heads=1, head_dim=1, element_bytes=2), "hidden=0 must be at least 1"),
        (lambda: Rates(bus=0, gemm=1), "must be above 0"),
        (lambda: Rates(bus=1, gemm=1, other=-1), "must be above 0"),
        (lambda: Column(batches=0, first_bytes=0, rest_bytes=0), "at least 1 batch"),
        (lambda: best_split(OPT_6_7B, Rates(bus=1, gemm=1), 0, 5, Schedule.SERIAL), "batch=0 and length=5"),
    ],
    ids=range(5),
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(deltakv.ConfigError, match=message):
        make()


def test_predicted_parts_say_where_the_time_goes() -> None:
    parts = predict(OPT_6_7B, Rates(bus=1e10, gemm=1e14, other=0.5), 2, 100, 25, Schedule.PIPELINED)
    assert parts.x == pytest.approx(2 * 25 * 8192 / 1e10)
    assert parts.kv == pytest.approx(2 * 75 * 16384 / 1e10)
    assert parts.recompute == pytest.approx(2 * 25 * 4 * 4096 * 4096 / 1e14)
    assert parts.other == 0.5
