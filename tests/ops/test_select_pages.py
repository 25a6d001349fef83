"""select_pages against the reference's sets and loops, alone and behind the ops that feed it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_inputs import make_paged
from torch import Tensor

import oracle
from deltakv import ops
from deltakv.ops.decode_attention.naive import decode_attention_stats as naive_stats
from deltakv.ops.page_scores.naive import page_scores as naive_scores
from deltakv.ops.select_pages.naive import select_pages as naive_select

Op = Callable[..., Any]
OPS = [
    pytest.param(ops.select_pages, id="registered"),
    pytest.param(triton_ops.select_pages, id="triton", marks=pytest.mark.gpu),
    pytest.param(naive_select, id="naive"),
]
PIPELINES = [
    pytest.param(ops.decode_attention_stats, ops.page_scores, ops.select_pages, id="registered"),
    pytest.param(naive_stats, naive_scores, naive_select, id="naive"),
]

#: The stated rounding of a score, relative: see test_page_scores.
ROUNDING = 2e-5


def check_exact(op: Op, scores: Tensor, lengths: Sequence[int], limits: tuple[int, int, int, int, int]) -> None:
    """The op's picks on these very scores must be the reference's; `limits` are its arguments from page_size on."""
    pages, n_kept = op(scores, torch.tensor(lengths, dtype=torch.int32), *limits)
    assert pages.dtype == n_kept.dtype == torch.int32
    page_size, budget, *_, min_context = limits
    room = min(scores.shape[1], max(budget, math.ceil(min_context / page_size)))
    assert pages.shape == (len(scores), room) and n_kept.shape == scores.shape[:1]
    for row, length in enumerate(lengths):
        want = oracle.pick(scores[row].tolist(), length, *limits)
        kept = int(n_kept[row])
        assert pages[row, :kept].tolist() == want, f"row {row}: length {length}, limits {limits}"
        assert (pages[row, kept:] == 0).all(), f"row {row}: zeros beyond n_kept"


LIMITS = [
    (16, 4, 1, 0, 0),
    (16, 4, 2, 1, 0),
    (16, 8, 3, 2, 100),
    (16, 2, 1, 1, 0),  # nothing left to choose
    (16, 1, 1, 0, 0),
    (32, 5, 1, 3, 0),
    (64, 3, 1, 1, 700),
    (128, 3, 2, 0, 0),
    (16, 64, 8, 0, 0),
    (16, 64, 8, 1, 2048),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_random_scores(op: Op, limits: tuple[int, int, int, int, int]) -> None:
    page_size, budget = limits[:2]
    edge = budget * page_size
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, edge - 1, edge, edge + 1, edge + page_size]
    lengths += [edge + page_size + 1, limits[4], limits[4] + 1, 2 * edge + 5, 5 * edge, 5 * edge + 1, 3000]
    width = max(math.ceil(n / page_size) for n in lengths) + 3
    generator = torch.Generator().manual_seed(sum(limits))
    check_exact(op, torch.rand(len(lengths), width, generator=generator), lengths, limits)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("distinct", [1, 2, 4, 16])
@pytest.mark.parametrize("width", [9, 40, 257, 1030])
def test_ties_go_to_the_earlier_page(op: Op, distinct: int, width: int) -> None:
    """Exactly representable scores, most of them equal."""
    generator = torch.Generator().manual_seed(width + distinct)
    scores = torch.randint(0, distinct, (40, width), generator=generator) / 8
    chooser = random.Random(width * distinct)
    lengths = [chooser.randint(1, width * 16) for _ in range(38)] + [width * 16, width * 16 - 15]
    for budget, recent, sinks in ((4, 1, 0), (7, 2, 1), (width // 2, 1, 1)):
        check_exact(op, scores, lengths, (16, budget, recent, sinks, 0))


@pytest.mark.parametrize("op", OPS)
def test_neighbouring_floats_are_no_ties(op: Op) -> None:
    """Scores one unit in the last place apart: a bias added to the score would blur them."""
    step = torch.arange(200)
    for base in (0.125, 1.0, 3e-6, 1e-38):
        bits = torch.tensor(base).view(torch.int32) + step.int()
        rising = bits.view(torch.float32)
        scores = torch.stack([rising, rising.flip(0), rising.roll(57)])
        check_exact(op, scores, [200 * 16, 200 * 16, 199 * 16 + 3], (16, 20, 2, 1, 0))


@pytest.mark.parametrize("op", OPS)
def test_both_zeros_are_equal(op: Op) -> None:
    scores = torch.zeros(2, 30)
    scores[0, :10] = -0.0
    scores[1, 10:] = -0.0
    check_exact(op, scores, [480, 470], (16, 8, 1, 0, 0))


@pytest.mark.parametrize("op", OPS)
def test_forced_pages_beat_infinite_scores(op: Op) -> None:
    scores = torch.full((4, 20), math.inf)
    scores[1, :2] = 0.0
    scores[1, 15:] = 0.0
    scores[2, :2] = -math.inf
    scores[2, 17:] = -math.inf
    scores[3] = 1.0
    scores[3, [7, 11]] = math.inf
    check_exact(op, scores, [320, 320, 318, 305], (16, 8, 3, 2, 0))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [1.0, 1e30, 3.4e38])
def test_negative_scores(op: Op, scale: float) -> None:
    """Other scorers give negative scores; pages beyond the end must not win with their zeros."""
    generator = torch.Generator().manual_seed(4)
    scores = -torch.rand(12, 40, generator=generator) * scale
    lengths = [640, 639, 625, 624, 400, 200, 161, 160, 159, 144, 16, 1]
    for row, length in enumerate(lengths):
        scores[row, math.ceil(length / 16) :] = 0.0
    check_exact(op, scores, lengths, (16, 9, 1, 1, 0))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("garbage", [math.inf, 1e9, math.nan])
def test_scores_beyond_the_end_do_not_count(op: Op, garbage: float) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = [640, 639, 625, 400, 200, 161, 160, 159, 17, 16, 1, 0]
    scores = torch.rand(len(lengths), 60, generator=generator)
    for row, length in enumerate(lengths):
        scores[row, math.ceil(length / 16) :] = garbage
    check_exact(op, scores, lengths, (16, 9, 2, 1, 0))


@pytest.mark.parametrize("op", OPS)
def test_visible_pages_of_minus_infinity_come_before_none(op: Op) -> None:
    """A page that is worth nothing is still a page: the budget is filled from the visible ones."""
    scores = torch.full((3, 30), -math.inf)
    scores[1, 5:8] = 1.0
    scores[2, 25:] = 0.0
    check_exact(op, scores, [25 * 16, 25 * 16 - 4, 25 * 16], (16, 10, 1, 1, 0))


@pytest.mark.parametrize("op", OPS)
def test_min_context_is_inclusive(op: Op) -> None:
    scores = torch.rand(4, 20, generator=torch.Generator().manual_seed(6))
    limits = (16, 5, 1, 1, 200)
    pages, n_kept = op(scores, torch.tensor([199, 200, 201, 80], dtype=torch.int32), *limits)
    assert n_kept.tolist() == [13, 13, 5, 5]
    assert pages[1, :13].tolist() == list(range(13))
    check_exact(op, scores, [199, 200, 201, 80], limits)


@pytest.mark.parametrize("op", OPS)
def test_long_rows_and_empty_batches(op: Op) -> None:
    scores = torch.rand(3, 5000, generator=torch.Generator().manual_seed(8))
    check_exact(op, scores, [80000, 79999, 20000], (16, 64, 8, 1, 2048))
    check_exact(op, scores[:, :0], [0, 0, 0], (16, 64, 8, 1, 0))
    check_exact(op, scores[:0], [], (16, 64, 8, 1, 0))


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[list[float]], list[int], tuple[int, int, int, int, int]]:
    page_size = draw(st.sampled_from([16, 32, 64, 128]))
    recent = draw(st.integers(1, 4))
    sinks = draw(st.integers(0, 3))
    budget = recent + sinks + draw(st.integers(0, 6))
    width = draw(st.integers(1, 24))
    rows = draw(st.integers(1, 6))
    lengths = [draw(st.integers(0, width * page_size)) for _ in range(rows)]
    value = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, math.inf, -0.125, 1e-40]) | st.floats(0, 4, width=32)
    scores = [draw(st.lists(value, min_size=width, max_size=width)) for _ in range(rows)]
    min_context = draw(st.sampled_from([0, 0, 16, 100, 1000]))
    return scores, lengths, (page_size, budget, recent, sinks, min_context)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=selections())
def test_any_scores(op: Op, case: tuple[list[list[float]], list[int], tuple[int, int, int, int, int]]) -> None:
    scores, lengths, limits = case
    check_exact(op, torch.tensor(scores, dtype=torch.float32), lengths, limits)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Also a matter of many equal scores: an unstable sort shows here."""
    generator = torch.Generator().manual_seed(9)
    scores = torch.randint(0, 5, (64, 300), generator=generator) / 8
    lengths = torch.randint(0, 4801, (64,), generator=generator).int()
    limits = (16, 32, 4, 1, 100)
    pages, n_kept = ops.select_pages(scores, lengths, *limits)
    again = ops.select_pages(scores, lengths, *limits)
    assert torch.equal(again[0], pages) and torch.equal(again[1], n_kept), "same input, same pick"
    backwards = ops.select_pages(scores.flip(0), lengths.flip(0), *limits)
    assert torch.equal(backwards[0].flip(0), pages) and torch.equal(backwards[1].flip(0), n_kept)
    for row in range(64):
        alone = ops.select_pages(scores[[row]], lengths[[row]], *limits)
        assert torch.equal(alone[0][0], pages[row]) and alone[1][0] == n_kept[row]


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_left_alone_and_strides_do_not_matter(op: Op) -> None:
    scores = torch.rand(6, 40, generator=torch.Generator().manual_seed(10))
    lengths = torch.tensor([640, 600, 333, 17, 0, 512], dtype=torch.int32)
    before = scores.clone(), lengths.clone()
    want = op(scores, lengths, 16, 8, 2, 1, 0)
    assert torch.equal(scores, before[0]) and torch.equal(lengths, before[1])
    strided = op(scores.t().contiguous().t(), torch.stack([lengths, lengths * 0], 1)[:, 0], 16, 8, 2, 1, 0)
    assert torch.equal(want[0], strided[0]) and torch.equal(want[1], strided[1])


#: Arguments of make_paged and limits (budget, recent, sinks in pages; min_context) for the whole chain.
CHAINS: list[tuple[dict[str, Any], tuple[int, int, int, int]]] = [
    ({"layout": "heads_outermost"}, (8, 2, 1, 0)),
    ({"n_heads": 8, "n_kv": 1, "head_dim": 64, "table": "shared"}, (4, 1, 0, 0)),
    ({"n_heads": 4, "n_kv": 4, "head_dim": 80, "layout": "heads_outermost"}, (12, 3, 2, 300)),
    ({"sinks": True, "head_dim": 64, "sharpness": 4.0}, (6, 1, 1, 0)),
    ({"sinks": True, "n_heads": 6, "n_kv": 3, "layout": "heads_first"}, (10, 1, 0, 100)),
    ({"page_size": 32, "head_dim": 128, "n_heads": 2, "n_kv": 1}, (4, 1, 1, 0)),
    ({"page_size": 64, "sharpness": 1.0, "table": "contiguous"}, (3, 1, 0, 0)),
    ({"page_size": 128, "layout": "interleaved", "sinks": True}, (3, 1, 1, 0)),
    ({"sharpness": 0.5, "n_heads": 12, "n_kv": 2, "layout": "heads_outermost"}, (16, 4, 1, 0)),
    ({"dtype": torch.bfloat16, "head_dim": 64, "layout": "heads_outermost"}, (8, 2, 1, 0)),
]
ROWS = 120


@pytest.mark.parametrize("stats, score, select", PIPELINES)
@pytest.mark.parametrize("chain", range(len(CHAINS)))
def test_picks_agree_with_the_dense_reference(stats: Op, score: Op, select: Op, chain: int) -> None:
    """From queries and pages to picks, 120 random rows for each chain: more than a thousand in all."""
    options, limits = CHAINS[chain]
    chooser = random.Random(chain)
    page_size = options.get("page_size", 16)
    edge = limits[0] * page_size
    lengths = [chooser.randint(edge, 4 * edge) for _ in range(ROWS - 10)] + [
        chooser.randint(1, edge) for _ in range(10)
    ]
    batch = make_paged(lengths, seed=chain, **options)
    _, *softmax = stats(*batch.arguments)
    rows = batch.seq_lens[:, 0].contiguous()
    pages, n_kept = select(score(*softmax, rows, page_size), rows, page_size, *limits)
    equal = 0
    for row, length in enumerate(lengths):
        scores = oracle.page_scores(batch.q[row], batch.keys[row][0], batch.scale, length, page_size, batch.sinks)
        want = oracle.pick(scores, length, page_size, *limits)
        got = pages[row, : int(n_kept[row])].tolist()
        assert oracle.picks_agree(got, want, scores, 2 * ROUNDING * max(scores)), f"row {row}: {got} {want}"
        equal += got == want
    assert equal >= ROWS - 2, "near-ties are rare: this many disagreements are no rounding"


@pytest.mark.parametrize("limits", [(16, 4, 1, 1, 0), (32, 2, 1, 0, 100)])
def test_opcheck(limits: tuple[int, int, int, int, int]) -> None:
    scores = torch.rand(4, 12, generator=torch.Generator().manual_seed(12))
    arguments = (scores, torch.tensor([190, 100, 0, 17], dtype=torch.int32), *limits)
    torch.library.opcheck(torch.ops.deltakv.select_pages.default, arguments)
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    pages, n_kept = torch.ops.deltakv.select_pages(*meta)
    assert pages.device.type == n_kept.device.type == "meta"
    assert pages.dtype == n_kept.dtype == torch.int32
    assert pages.shape == (4, 4) and n_kept.shape == (4,)
