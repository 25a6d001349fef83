"""What is particular to the Triton ops: logits in 16 bits, tile by tile; splits; long rows; repeated runs.

On the GPU machine the tests of their ops run them beside the other versions, case for case; here their logic runs in
Triton's interpreter at small shapes.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from paged_inputs import LENGTHS, absolute, make_paged
from triton_ops import DTYPES, ON_GPU, attention, attention_into, attention_stats, page_scores, select_pages

import oracle
from deltakv.ops.decode_attention.naive import decode_attention_stats as naive_stats

#: Relative rounding of a logit in fp16, and so of a probability for each unit of distance from its tile's peak.
HALF = 2.0**-11

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"head_dim": 64, "n_heads": 6, "layout": "heads_outermost"},
    "mha": {"head_dim": 96, "n_heads": 3, "n_kv": 3, "layout": "interleaved"},
    "mqa": {"head_dim": 80, "n_heads": 20, "n_kv": 1, "page_size": 32},
    "wide": {"head_dim": 256, "n_heads": 4, "n_kv": 2, "page_size": 64, "layout": "heads_first"},
    "many": {"head_dim": 128, "n_heads": 64, "n_kv": 1, "page_size": 128, "sinks": True},
    "groups": {"head_dim": 64, "n_heads": 8, "n_kv": 4, "sinks": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape: str, dtype: torch.dtype) -> None:
    batch = make_paged([1, 15, 16, 17, 64, 129, 600, 0], seed=len(shape), dtype=dtype, **SHAPES[shape])
    out, relative, peaks, lse = attention_stats(*batch.arguments)
    want_out, want_relative, want_peaks, want_lse = naive_stats(*batch.arguments)
    assert relative.dtype == torch.float16 and peaks.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), want_out.float(), rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
    logits, want = absolute(relative, peaks), absolute(want_relative, want_peaks)
    for row, length in enumerate(batch.seq_lens[:, 0].tolist()):
        got, exact = logits[row, :, :length], want[row, :, :length]
        distance = peaks[row].repeat_interleave(relative.shape[3], 0).T[:, :length] - exact
        assert ((got - exact).abs() <= HALF * distance + 1e-4).all(), f"row of {length} tokens"
        assert (relative[row].transpose(0, 1).flatten(1)[:, :length] <= 0).all()


@pytest.mark.parametrize("shape", ["gqa", "groups", "many"])
@pytest.mark.parametrize("expected", [0, 16, 512, 2064, 2048 * 3])
def test_rows_beyond_what_is_expected(shape: str, expected: int) -> None:
    """The grid is cut for shorter rows: the last chunk of a longer one goes on to its end, whichever they are."""
    lengths = [2047, 2048, 2049, 0, 4200, 17] if expected else [0, 17, 600]
    batch = make_paged(lengths, seed=expected, **SHAPES[shape])
    got, want = attention_into(*batch.arguments, expected=expected), naive_stats(*batch.arguments)[0]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-5)
    assert torch.equal(got[lengths.index(0)], torch.zeros_like(want[0]))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_from_queries_to_picks(dtype: torch.dtype) -> None:
    """The chain of a SELECT layer: equal to the reference's picks, but for pages that 16 bits cannot tell apart."""
    chooser = random.Random(3)
    lengths = [chooser.randint(150, 700) for _ in range(24)] + [16, 128, 129]
    batch = make_paged(lengths, head_dim=64, n_heads=6, n_kv=2, sharpness=2.0, dtype=dtype, layout="heads_outermost")
    limits = (16, 8, 2, 1, 0)
    _, *softmax = attention_stats(*batch.arguments)
    rows = batch.seq_lens[:, 0].contiguous()
    pages, n_kept = select_pages(page_scores(*softmax, rows, 16), rows, *limits)
    equal = 0
    for row, length in enumerate(lengths):
        scores = oracle.page_scores(batch.q[row], batch.keys[row][0], batch.scale, length, 16, batch.sinks)
        want = oracle.pick(scores, length, *limits)
        got = pages[row, : int(n_kept[row])].tolist()
        assert oracle.picks_agree(got, want, scores, 20 * HALF * max(scores)), f"row {row}: {got} {want}"
        equal += got == want
    assert equal >= len(lengths) - 4, "near-ties are rare: this many disagreements are no rounding"


@pytest.mark.parametrize("capacity", [16, 4096, 4112, 20000 if ON_GPU else 4200])
def test_rows_around_the_edges_of_chunks(capacity: int) -> None:
    """One table's width for all of them, so the same splits: the chunk before, the chunk behind, none at all."""
    from deltakv.ops.decode_attention.triton import chunk_tokens

    chunk = chunk_tokens(capacity)
    edges = [n + d for n in range(0, capacity + 1, chunk) for d in (-1, 0, 1) if 0 <= n + d <= capacity]
    lengths = sorted({*edges, capacity, 1})[-9:]
    batch = make_paged([*lengths, capacity], head_dim=16, n_heads=2, n_kv=1, extra_width=0)
    out, _, _, lse = attention_stats(*batch.arguments)
    want_out, _, _, want_lse = naive_stats(*batch.arguments)
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-4)
    assert torch.equal(attention(*batch.arguments), out), "with statistics or without: the same bits"


@pytest.mark.parametrize("width", [4096, 65536 if ON_GPU else 5000])
def test_many_pages(width: int) -> None:
    scores = torch.randint(0, 50, (2, width), generator=torch.Generator().manual_seed(0)) / 7
    lengths = torch.tensor([width * 16, width * 16 - 1000], dtype=torch.int32)
    pages, n_kept = select_pages(scores, lengths, 16, 64, 8, 1, 2048)
    for row, length in enumerate(lengths.tolist()):
        assert pages[row, : int(n_kept[row])].tolist() == oracle.pick(scores[row].tolist(), length, 16, 64, 8, 1, 2048)


@pytest.mark.skipif(ON_GPU, reason="8 GB lie between the first token and the last; on the CPU they lie in no memory")
def test_tokens_far_apart(tmp_path: Path) -> None:
    """Any strides: tokens of a page whose offsets need 64 bits, in a file that is a hole but for them."""
    batch = make_paged([60], head_dim=16, n_heads=2, n_kv=1, dtype=torch.float16)
    n_pages, page_size, n_kv, dim = batch.k_cache.shape
    apart = (1 << 32) // (page_size - 1)
    shape = ((page_size - 1) * apart + n_pages * dim,)
    hole = torch.from_numpy(numpy.memmap(tmp_path / "hole", numpy.float16, "w+", shape=shape))
    far = hole.as_strided((n_pages, page_size, n_kv, dim), (dim, apart, dim, 1))
    far.copy_(batch.k_cache)
    q, near, _, *rest = batch.arguments
    assert torch.equal(attention(q, far, far, *rest), attention(q, near, near, *rest))


def test_a_row_depends_on_itself_alone() -> None:
    """Bit for bit: alone, in another order, on other pages of another pool, and whatever the unused entries say."""
    lengths = [1, 17, 64, 0, 300, 640]
    batch = make_paged(lengths, head_dim=32, table="permuted", extra_width=0)
    elsewhere = make_paged(lengths, head_dim=32, table="contiguous", layout="heads_outermost", extra_width=0)
    together = attention_stats(*batch.arguments)
    assert all(torch.equal(a, b) for a, b in zip(together, attention_stats(*elsewhere.arguments), strict=True))
    for row, length in enumerate(lengths):
        batch.block_table[row, 0, math.ceil(length / 16) :] = row
    for rows in ([5, 4, 3, 2, 1, 0], [2], [4, 4, 1]):
        alone = attention_stats(*batch.rows(rows))
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True)), rows


@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_picks_are_exact(distinct: int) -> None:
    """Ties go to the earlier page; forced pages are in whatever their score; nothing beyond the end is looked at."""
    generator = torch.Generator().manual_seed(distinct)
    scores = torch.randint(-2, distinct, (8, 90), generator=generator) / 8
    scores[3, 40] = math.inf
    lengths = torch.tensor([1440, 1439, 1425, 1424, 300, 128, 16, 0], dtype=torch.int32)
    for limits in ((16, 8, 2, 1, 0), (16, 20, 1, 0, 500), (16, 4, 3, 1, 0)):
        pages, n_kept = select_pages(scores, lengths, *limits)
        for row, length in enumerate(lengths.tolist()):
            want = oracle.pick(scores[row].tolist(), length, *limits)
            assert pages[row, : int(n_kept[row])].tolist() == want
            assert (pages[row, int(n_kept[row]) :] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hundred_runs_give_the_same_bits(shape: str, dtype: torch.dtype) -> None:
    """Ragged rows at page and split edges, the memory of a run's buffers poisoned by the one before."""
    lengths = [*LENGTHS, 511, 512, 513, 2047, 2048, 2049, 4095, 4096, 4097, 9000]
    batch = make_paged(lengths, dtype=dtype, **SHAPES[shape])
    rows = batch.seq_lens[:, 0].contiguous()
    first = None
    for _ in range(100):
        junk = torch.full((1 << 24,), math.nan, device="cuda")
        del junk
        out, *softmax = attention_stats(*batch.arguments)
        scores = page_scores(*softmax, rows, batch.k_cache.shape[1])
        result = (out, *softmax, scores, *select_pages(scores, rows, batch.k_cache.shape[1], 8, 2, 1, 0))
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
