"""Pieces cover every token once and fit a chunk; the timeline's time tends to the scheduler's formulas."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakv.offload.pieces import Kind, Piece, pieces
from deltakv.offload.scheduler import Column, LayerShape, Rates, Schedule, best_split, predict
from deltakv.offload.timeline import draw, simulate

SHAPE = LayerShape(hidden=4096, kv_heads=32, head_dim=128, element_bytes=2)
RATES = Rates(bus=55e9, gemm=450e12, other=2e-4)


@given(
    st.integers(0, 500),
    st.floats(0, 1),
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from(Schedule),
    st.integers(1, 6),
)
def test_every_token_once_and_no_piece_too_long(
    length: int, share: float, x_tokens: int, kv_tokens: int, schedule: Schedule, together: int
) -> None:
    split = int(share * length)
    cut = pieces(length, split, x_tokens, kv_tokens, schedule, together)
    covered = [(token, piece.kind) for piece in cut for token in range(piece.start, piece.stop)]
    assert sorted(token for token, _ in covered) == list(range(length))
    assert all((kind is Kind.X) == (token < split) for token, kind in covered)
    assert all(0 < piece.tokens <= (x_tokens if piece.kind is Kind.X else kv_tokens) for piece in cut)
    if schedule is Schedule.PIPELINED:
        assert not any(piece.barrier or piece.ahead for piece in cut)
    rounds = [index for index, piece in enumerate(cut) if piece.barrier]
    for start, stop in itertools.pairwise([*rounds, len(cut)]):
        x = [index for index in range(start, stop) if cut[index].kind is Kind.X]
        assert x == list(range(start, start + len(x))) and 1 <= len(x) <= together, "a round is X, then K and V"
        assert cut[start].ahead == len(x) - 1 and not any(piece.ahead for piece in cut[start + 1 : stop])
    if schedule is Schedule.SERIAL:
        assert bool(rounds) == bool(split) and len(rounds) == -(-split // (x_tokens * together))
    if split:
        assert cut[0].kind is Kind.X


def test_a_round_s_recomputation_waits_for_all_its_x() -> None:
    cut = pieces(100, 60, 10, 20, Schedule.SERIAL, together=3)
    assert [piece.kind.value for piece in cut] == ["X", "X", "X", "KV"] * 2
    spans = simulate([cut], SHAPE, Rates(bus=1e9, gemm=1e12), 1, slots=4).spans
    x = [span for span in spans if span.what == "X"]
    recomputed = [span for span in spans if span.what == "recompute"]
    assert recomputed[0].start == x[2].stop and recomputed[3].start == x[5].stop
    assert x[3].start == max(recomputed[2].stop, next(span for span in spans if span.what == "KV").stop)


def test_x_and_kv_take_turns() -> None:
    order = [piece.kind.value for piece in pieces(160, 60, 20, 20, Schedule.PIPELINED)]
    assert order == ["X", "KV", "KV", "X", "KV", "X", "KV", "KV"]


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("batch", [1, 32])
def test_the_timeline_tends_to_the_formula(schedule: Schedule, batch: int) -> None:
    """With fine pieces and many layers. The paper's formula has no time for the rest of a layer."""
    rates = RATES if schedule is Schedule.PIPELINED else Rates(bus=RATES.bus, gemm=RATES.gemm)
    split = best_split(SHAPE, rates, batch, 4096, schedule)
    cut = pieces(4096, split.tokens, 16, 16, schedule)
    timeline = simulate([cut] * 40, SHAPE, rates, batch, slots=256)
    assert timeline.seconds == pytest.approx(40 * split.parts.total, rel=0.03)
    assert timeline.busy("bus") <= 1 + 1e-9


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_column_s_timeline_tends_to_the_formula(share: float) -> None:
    """Weights cross once a layer, for all batches."""
    column = Column(batches=4, first_bytes=10**8, rest_bytes=5 * 10**8)
    cut = pieces(1024, int(share * 1024), 16, 16, Schedule.PIPELINED)
    timeline = simulate([cut] * 20, SHAPE, RATES, 16, slots=64, column=column)
    layer = predict(SHAPE, RATES, 16, 1024, int(share * 1024), Schedule.PIPELINED, column).total
    assert timeline.seconds == pytest.approx(20 * layer, rel=0.03)
    weights = [span for span in timeline.spans if span.what == "weights"]
    assert len(weights) == 20 and weights[0].stop == pytest.approx(6e8 / RATES.bus)


def test_weights_wait_for_the_layer_before_the_last() -> None:
    """Their place is taken until then, however idle the bus is."""
    rates, column = Rates(bus=1e12, gemm=1e12, other=1.0), Column(batches=2, first_bytes=0, rest_bytes=10**6)
    timeline = simulate([(), (), ()], SHAPE, rates, 1, slots=2, column=column)
    starts = [span.start for span in timeline.spans if span.what == "weights"]
    assert starts[1] < 0.1 and starts[2] > 1.9


def test_attention_is_where_its_piece_is() -> None:
    """And what is left of the layer's time comes behind."""
    rates = Rates(bus=1e9, gemm=1e12, other=0.5, attention=0.001)
    timeline = simulate([(Piece(Kind.KV, 0, 100), Piece(Kind.KV, 100, 200))], SHAPE, rates, 1, slots=2)
    rest = [span for span in timeline.spans if span.what == "rest"]
    assert [round(span.stop - span.start, 6) for span in rest] == [0.1, 0.1, 0.3]


def test_without_overlap_everything_adds_up() -> None:
    cut = pieces(1000, 300, 100, 100, Schedule.PIPELINED)
    timeline = simulate([cut] * 3, SHAPE, RATES, 4, slots=8, overlap=False)
    one = 4 * (300 * SHAPE.alpha + 700 * SHAPE.kappa) / RATES.bus + 4 * 300 * SHAPE.phi / RATES.gemm + RATES.other
    assert timeline.seconds == pytest.approx(3 * one)


def test_fewer_chunks_never_help() -> None:
    cut = pieces(2000, 1200, 100, 50, Schedule.PIPELINED)
    seconds = [simulate([cut] * 4, SHAPE, RATES, 8, slots=slots).seconds for slots in (1, 2, 3, 4, 8, 64)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 1.2 * seconds[-1]


def test_a_chunk_is_used_again_only_when_it_is_free() -> None:
    """One chunk: a copy starts when the piece before it has been recomputed."""
    cut = (Piece(Kind.X, 0, 10), Piece(Kind.KV, 10, 20))
    spans = simulate([cut], SHAPE, Rates(bus=1e9, gemm=1e12), 1, slots=1).spans
    recomputed = next(span for span in spans if span.what == "recompute")
    moved = next(span for span in spans if span.what == "KV")
    assert moved.start == recomputed.stop > 0


def test_the_picture_shows_both_lanes() -> None:
    cut = pieces(1000, 500, 100, 100, Schedule.PIPELINED)
    bus, gpu, scale = draw(simulate([cut] * 4, SHAPE, RATES, 8, slots=4), first=1).splitlines()
    assert bus.startswith("bus  ") and {"X", "="} <= set(bus[5:])
    assert gpu.startswith("GPU  ") and {"R", "o"} <= set(gpu[5:])
    assert scale.endswith(" ms")
    assert draw(simulate([], SHAPE, RATES, 8, slots=4)) == ""
