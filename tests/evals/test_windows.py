"""Pieces of text, and how sure a mean is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltakv
from deltakv.errors import InputError
from deltakv.evals.picks import new_shares
from deltakv.evals.windows import cut, interval, measure_windows, open_window

SPARSE = deltakv.Delta(budget=64, recent=16, sinks=16, min_context=0, plan="FSRRSR")


def test_pieces_of_both_kinds_come_from_every_text() -> None:
    texts = [torch.arange(70), 1000 + torch.arange(45), 2000 + torch.arange(9)]
    calibrate, confirm = cut(texts, ["a", "b", "c"], 9, most=3)
    assert [int(piece[0]) for piece in calibrate] == [0, 1000, 20]
    assert [int(piece[0]) for piece in confirm] == [10, 1010, 30]
    assert all(len(piece) == 10 for piece in calibrate + confirm)
    seen = torch.cat(calibrate)
    assert not torch.isin(torch.cat(confirm), seen).any()
    with pytest.raises(InputError, match="a: 19 tokens"):
        cut([torch.arange(19)], ["a"], 9, most=1)


def test_an_interval_holds_the_mean_and_is_wider_for_neighbours_that_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1024, generator=generator)
    low, high = interval(noise)
    assert low < noise.mean() < high
    assert high - low == pytest.approx(3.92 * noise.std().item() / 32, rel=0.2)
    alike = noise[::16].repeat_interleave(16)
    wide = interval(alike)
    assert wide[1] - wide[0] > 2.5 * (high - low)
    assert interval(noise) == (low, high)
    assert interval(torch.full((5,), 2.0)) == (2.0, 2.0)


def test_windows_are_measured_as_the_positions_of_compare_are(tiny_model: Any) -> None:
    """Twice the same, from the same cache; full attention differs from itself by nothing; a part is the first ones."""
    model = tiny_model("llama").eval().requires_grad_(False)
    pieces = torch.randint(3, 128, (2, 181), generator=torch.Generator().manual_seed(3))
    windows = [open_window(model, piece, 40, 16) for piece in pieces]
    full = measure_windows(model, deltakv.Full(), windows)
    assert full.differences.kl.shape == (80,) and full.differences.kl.max() < 1e-9 and full.differences.agree.all()
    sparse = measure_windows(model, SPARSE, windows, picks=True)
    assert torch.equal(measure_windows(model, SPARSE, windows).differences.kl, sparse.differences.kl)
    assert sparse.differences.kl.mean() > 1e-4 and sparse.attended < full.attended and 0 < sparse.recall < 1
    part = measure_windows(model, SPARSE, [window.first(10) for window in windows]).differences.kl
    torch.testing.assert_close(part, sparse.differences.kl.view(2, 40)[:, :10].flatten(), atol=1e-9, rtol=1e-4)
    logits = model(pieces[1][None, :-1], use_cache=False).logits[0, -40:].double().log_softmax(-1)
    want = -logits.gather(1, pieces[1][-40:, None])[:, 0]
    torch.testing.assert_close(full.differences.surprise[40:], want, atol=1e-5, rtol=0)


def test_what_is_new_in_a_pick() -> None:
    picks = [torch.tensor(pages) for pages in ([0, 1, 2, 3], [0, 1, 2, 4], [5, 6, 7, 8, 9], [5, 9])]
    assert new_shares(picks).tolist() == [0.25, 1.0, 0.0]
    assert new_shares(picks[:1]).shape == (0,)


def test_new_pages_of_windows_are_those_of_decode_steps(tiny_model: Any) -> None:
    """Against picks recorded while decoding the same tokens one by one: by layer, and never across two windows."""
    model = tiny_model("llama").eval().requires_grad_(False)
    pieces = torch.randint(3, 128, (2, 181), generator=torch.Generator().manual_seed(3))
    windows = [open_window(model, piece, 24, 16) for piece in pieces]
    assert not measure_windows(model, SPARSE, windows).new_pages
    found = measure_windows(model, SPARSE, windows, picks=True).new_pages
    new: dict[int, list[float]] = {}
    for piece in pieces:
        with deltakv.apply(model, SPARSE) as handle:
            handle.stats.record_picks = True
            cache = handle.new_cache()
            model(piece[None, :-25], past_key_values=cache)
            for token in piece[-25:-1]:
                model(token.view(1, 1), past_key_values=cache)
        last: dict[int, set[int]] = {}
        for _, layer, pages, n_kept in handle.stats.picks:
            now = set(pages[0, : n_kept[0]].tolist())
            if layer in last:
                new.setdefault(layer, []).append(len(now - last[layer]) / len(now))
            last[layer] = now
    assert list(found) == [1, 4] and all(found.values())
    assert found == {layer: pytest.approx(sum(shares) / 46) for layer, shares in new.items()}
