"""page_scores against the dense reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_ops
from paged_inputs import EQUAL, LENGTHS, Paged, make_paged
from torch import Tensor

import oracle
from deltakv import ops
from deltakv.ops.page_scores import by_length
from deltakv.ops.page_scores.naive import page_scores as naive_scores

Op = Callable[..., Any]


def flat(op: Op, tile: int | None) -> Op:
    """The op on logits [rows, n_heads, tokens], cut into tiles of so many tokens, each relative to a peak of its own;
    None: one tile, as it is."""

    def scores(logits: Tensor, lse: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
        rows, n_heads, tokens = logits.shape
        if tile is None:
            return op(logits[:, None], logits.new_zeros((rows, 1, n_heads)), lse, seq_lens, page_size)
        tiles = math.ceil(tokens / tile)
        padded = torch.full((rows, n_heads, tiles * tile), math.nan)
        padded[..., :tokens] = logits
        cut = padded.view(rows, n_heads, tiles, tile).transpose(1, 2).contiguous()
        peaks = torch.where(cut.isfinite(), cut, -1e9).amax(-1)
        result = op(cut - peaks[..., None], peaks, lse, seq_lens, page_size)
        assert (result[:, tokens // page_size :] == 0).all()
        return result[:, : tokens // page_size]

    return scores


RUNNING = [
    pytest.param(flat(ops.page_scores, None), id="registered"),
    pytest.param(flat(ops.page_scores, 128), id="registered-tiles"),
    pytest.param(flat(by_length.page_scores, None), id="pytorch"),
    pytest.param(flat(by_length.page_scores, 128), id="pytorch-tiles"),
    pytest.param(flat(triton_ops.page_scores, None), id="triton", marks=pytest.mark.gpu),
    pytest.param(flat(triton_ops.page_scores, 128), id="triton-tiles", marks=pytest.mark.gpu),
]
OPS = [
    *RUNNING,
    pytest.param(flat(naive_scores, None), id="naive"),
    pytest.param(flat(naive_scores, 128), id="naive-tiles"),
]

#: The stated rounding of a page's score, relative: float32 logits of a few tens, then exp.
ROUNDING = 2e-5


def softmax_statistics(batch: Paged) -> tuple[Tensor, Tensor]:
    """What decode_attention_stats gives for the batch, from the plain keys: logits and lse, in float32."""
    rows, n_heads, _ = batch.q.shape
    page_size = batch.k_cache.shape[1]
    logits = torch.full((rows, n_heads, batch.block_table.shape[2] * page_size), -math.inf)
    lse = torch.full((rows, n_heads), -math.inf)
    for row in range(rows):
        k = batch.keys[row][0].double().repeat_interleave(n_heads // batch.keys[row][0].shape[1], dim=1)
        exact = torch.einsum("hd,thd->ht", batch.q[row].double(), k) * batch.scale
        logits[row, :, : len(k)] = exact.float()
        if batch.sinks is not None:
            exact = torch.cat([exact, batch.sinks.double()[:, None]], dim=1)
        lse[row] = torch.logsumexp(exact, dim=1).float()
    return logits, lse


CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"n_heads": 4, "n_kv": 4, "head_dim": 64},
    "one-head": {"n_heads": 1, "n_kv": 1},
    "sinks": {"n_heads": 8, "n_kv": 2, "sinks": True},
    "page-32": {"page_size": 32, "sinks": True, "head_dim": 80},
    "page-64": {"page_size": 64, "n_heads": 6, "extra_width": 0},
    "page-128": {"page_size": 128, "head_dim": 128},
    "very-wide": {"extra_width": 150},
    "sharp": {"sharpness": 20.0},
    "equal": {"lengths": EQUAL, "sinks": True},
    "all-equal": {"lengths": (333,) * 5},
}


def make_case(case: str, seed: int) -> Paged:
    return make_paged(**{"lengths": LENGTHS, "seed": seed, **CASES[case]})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_dense_reference(op: Op, case: str) -> None:
    batch = make_case(case, seed=len(case))
    page_size = batch.k_cache.shape[1]
    logits, lse = softmax_statistics(batch)
    lengths = batch.seq_lens[:, 0].contiguous()
    scores = op(logits, lse, lengths, page_size)
    assert scores.dtype == torch.float32 and scores.shape == (len(lengths), batch.block_table.shape[2])
    for row, length in enumerate(lengths.tolist()):
        want = oracle.page_scores(batch.q[row], batch.keys[row][0], batch.scale, length, page_size, batch.sinks)
        torch.testing.assert_close(
            scores[row, : len(want)].double(),
            torch.tensor(want, dtype=torch.float64),
            rtol=5 * ROUNDING if case == "sharp" else ROUNDING,
            atol=1e-30,
        )
        assert (scores[row, len(want) :] == 0).all(), f"beyond the end of row {row} of length {length}"


@pytest.mark.parametrize("op", OPS)
def test_max_over_heads_then_sum_over_tokens(op: Op) -> None:
    """By hand: two pages of two tokens that count, four heads; not a sum over heads, not a max of sums."""
    probabilities = torch.tensor(
        [
            [0.5, 0.125, 0.25, 0.125],
            [0.125, 0.5, 0.125, 0.25],
            [0.0625, 0.0625, 0.75, 0.125],
            [0.25, 0.25, 0.25, 0.25],
        ]
    )
    tokens = torch.full((1, 4, 32), -math.inf)
    where = [0, 15, 16, 31]
    tokens[0][:, where] = probabilities.log() + 3.0
    lse = torch.full((1, 4), 3.0)
    scores = op(tokens, lse, torch.tensor([32], dtype=torch.int32), 16)
    torch.testing.assert_close(scores, torch.tensor([[0.5 + 0.5, 0.75 + 0.25]]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("garbage", [50.0, float("nan"), float("inf")])
def test_logits_beyond_the_length_do_not_count(op: Op, garbage: float) -> None:
    """`seq_lens` decides what is visible, whatever lies behind."""
    batch = make_paged([1, 17, 40, 64, 0])
    logits, lse = softmax_statistics(batch)
    lengths = batch.seq_lens[:, 0].contiguous()
    want = op(logits, lse, lengths, 16)
    for row, length in enumerate(lengths.tolist()):
        logits[row, :, length:] = garbage
    # Not bit for bit: here, garbage moves its tile's peak, too.
    torch.testing.assert_close(op(logits, lse, lengths, 16), want, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_left_alone_and_strides_do_not_matter(op: Op) -> None:
    batch = make_paged(LENGTHS)
    logits, lse = softmax_statistics(batch)
    lengths = batch.seq_lens[:, 0]
    before = logits.clone(), lse.clone(), lengths.clone()
    want = op(logits, lse, lengths.contiguous(), 16)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, lse, lengths), strict=True))
    strided = torch.stack([lengths, lengths * 0 + 7], dim=1)[:, 0]
    assert not strided.is_contiguous()
    again = op(logits.transpose(0, 1).contiguous().transpose(0, 1), lse.t().contiguous().t(), strided, 16)
    torch.testing.assert_close(again, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", RUNNING)
@pytest.mark.parametrize("case", ["gqa", "sinks", "page-64", "very-wide", "one-head", "equal", "all-equal"])
def test_a_row_does_not_depend_on_its_batch(op: Op, case: str) -> None:
    batch = make_case(case, seed=11)
    logits, lse = softmax_statistics(batch)
    lengths = batch.seq_lens[:, 0].contiguous()
    page_size = batch.k_cache.shape[1]
    together = op(logits, lse, lengths, page_size)
    backwards = op(logits.flip(0), lse.flip(0), lengths.flip(0), page_size)
    assert torch.equal(together, backwards.flip(0))
    many = torch.tensor([3] * 50 + list(range(len(lengths))))
    assert torch.equal(op(logits[many], lse[many], lengths[many], page_size), together[many])
    for row in range(len(lengths)):
        alone = op(logits[[row]], lse[[row]], lengths[[row]], page_size)
        assert torch.equal(alone[0], together[row]), f"row {row} of length {lengths[row]}"


@pytest.mark.parametrize("op", RUNNING)
def test_naive_agrees(op: Op) -> None:
    batch = make_paged(LENGTHS, n_heads=8, sinks=True, seed=5)
    logits, lse = softmax_statistics(batch)
    lengths = batch.seq_lens[:, 0].contiguous()
    torch.testing.assert_close(
        op(logits, lse, lengths, 16), flat(naive_scores, None)(logits, lse, lengths, 16), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("page_size", [16, 32])
def test_opcheck(page_size: int) -> None:
    batch = make_paged([40, 17, 0, 1], page_size=page_size)
    logits, lse = softmax_statistics(batch)
    arguments = (logits[:, None], torch.zeros_like(lse)[:, None], lse, batch.seq_lens[:, 0].contiguous(), page_size)
    torch.library.opcheck(torch.ops.deltakv.page_scores.default, arguments)
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    scores = torch.ops.deltakv.page_scores(*meta)
    assert scores.device.type == "meta" and scores.dtype == torch.float32
    assert scores.shape == (4, batch.block_table.shape[2])
