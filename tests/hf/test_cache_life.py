"""The cache under all that transformers does to one: errors, copies, crops, resets, rows chosen and repeated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from hf.harness import KINDS, SMALL, assert_close, decode, failing_layer, left_padded, positions, ragged, tokens

METHOD = deltakv.Delta(**SMALL)
VARIED = ("llama", "gemma3", "gpt_oss")


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """One forward of `ids` [batch, tokens]: logits of all positions. mask: of all columns, for padded batches."""
    places = None if mask is None else positions(mask)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True).logits


def alone(model: Any, handle: Any, prompt: Tensor, steps: Tensor) -> Tensor:
    """Logits [steps, vocab] of decoding `steps` after `prompt`, on a cache of their own."""
    cache = handle.new_cache()
    feed(model, cache, prompt[None])
    return torch.cat([feed(model, cache, token.view(1, 1))[0] for token in steps])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 20], ids=["decode", "chunk"])
def test_a_forward_that_fails_half_way_never_happened(model_of: Any, kind: str, count: int) -> None:
    """Layers before the failure have stored their K and V; the next forward must not see it."""
    model, row = model_of(kind), tokens(140, seed=1)

    with deltakv.apply(model, METHOD) as handle:
        expected = alone(model, handle, row[:100], row[100:106])
        cache = handle.new_cache()
        feed(model, cache, row[None, :100])
        handle.stats.reset()
        got = [feed(model, cache, row[None, 100:101])[0]]
        for _ in range(2):
            with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"):
                feed(model, cache, tokens(count, seed=9)[None])
        assert cache.get_seq_length() == 101
        got += [feed(model, cache, token.view(1, 1))[0] for token in row[101:106]]
        assert_close(torch.cat(got), expected)
        assert handle.stats.steps == 6


def test_first_forward_fails(model_of: Any) -> None:
    model, row = model_of("llama"), tokens(90)

    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"):
            feed(model, cache, row[None, :70])
        feed(model, cache, row[None, :80])
        got = torch.cat([feed(model, cache, token.view(1, 1))[0] for token in row[80:]])
        assert_close(got, alone(model, handle, row[:80], row[80:]))


def test_first_forward_fails_and_the_next_has_another_batch(model_of: Any) -> None:
    """A cache whose only forward failed is empty, so it is free for a batch of any size."""
    model = model_of("llama")

    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"):
            feed(model, cache, tokens(20).view(2, 10))
        logits = feed(model, cache, tokens(30).view(3, 10))
        assert_close(logits, feed(model, handle.new_cache(), tokens(30).view(3, 10)))


@pytest.mark.parametrize("kind", VARIED)
def test_deepcopy_goes_its_own_way(model_of: Any, kind: str) -> None:
    """A prefix computed once and continued twice, as prompt caching does it."""
    model, prompt = model_of(kind), tokens(90, seed=1)
    paths = [tokens(20, seed=2), tokens(20, seed=3)]
    with deltakv.apply(model, METHOD) as handle:
        expected = [alone(model, handle, prompt, path) for path in paths]
        cache = handle.new_cache()
        feed(model, cache, prompt[None])
        caches = [cache, copy.deepcopy(cache)]
        got: list[list[Tensor]] = [[], []]
        for step in range(20):
            for index, path in enumerate(paths):
                got[index].append(feed(model, caches[index], path[step].view(1, 1))[0])
        for index in range(2):
            assert_close(torch.cat(got[index]), expected[index])


@pytest.mark.parametrize("kind", VARIED)
def test_reset_and_reuse(model_of: Any, kind: str) -> None:
    """After `reset` the cache is empty, takes a batch of another size, and keeps its pool's memory."""
    model = model_of(kind)
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, tokens(200).view(2, 100))
        before = cache.kv.pool.n_pages
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.kv_bytes == 0
        prompt, steps = tokens(90, seed=5), tokens(4, seed=6)
        feed(model, cache, prompt[None])
        got = torch.cat([feed(model, cache, token.view(1, 1))[0] for token in steps])
        assert_close(got, alone(model, handle, prompt, steps))
        assert cache.kv.pool.n_pages == before


@pytest.mark.parametrize("drop", [1, 7, 16, 40])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_crop(model_of: Any, kind: str, drop: int) -> None:
    """Tokens dropped from the end, over page edges, and others in their place."""
    model, prompt, steps = model_of(kind), tokens(100, seed=1), tokens(20, seed=2)
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, prompt[None])
        cache.crop(0)
        assert cache.get_seq_length() == 100
        cache.crop(-drop)
        assert cache.get_seq_length() == 100 - drop
        got = torch.cat([feed(model, cache, token.view(1, 1))[0] for token in steps])
        assert_close(got, alone(model, handle, prompt[: 100 - drop], steps))


def test_crop_to_nothing(model_of: Any) -> None:
    model, prompt = model_of("llama"), tokens(40)
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, tokens(30, seed=4)[None])
        cache.crop(-30)
        assert cache.get_seq_length() == 0
        assert_close(feed(model, cache, prompt[None]), feed(model, handle.new_cache(), prompt[None]))


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss"])
def test_crop_with_windows(model_of: Any, kind: str) -> None:
    """Windows can be rolled back if they were told to remember, as transformers asks for with its own caches."""
    model, prompt, steps = model_of(kind), tokens(100, seed=1), tokens(12, seed=2)
    with deltakv.apply(model, METHOD) as handle:
        expected = alone(model, handle, prompt[:93], steps)
        cache = handle.new_cache()
        cache.activate_past_recording()
        feed(model, cache, prompt[None, :90])
        cache.crop(0)
        feed(model, cache, prompt[None, 90:])
        cache.crop(-7)
        got = torch.cat([feed(model, cache, token.view(1, 1))[0] for token in steps])
        assert_close(got, expected)


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss"])
def test_crop_that_windows_refuse_changes_nothing(model_of: Any, kind: str) -> None:
    """A window that has forgotten cannot be rolled back: transformers' error, and the cache as it was."""
    model, row = model_of(kind), tokens(100, seed=1)
    with deltakv.apply(model, METHOD) as handle:
        expected = alone(model, handle, row[:90], row[90:])
        cache = handle.new_cache()
        feed(model, cache, row[None, :90])
        with pytest.raises((RuntimeError, ValueError)):
            cache.crop(-7)
        assert cache.get_seq_length() == 90
        got = torch.cat([feed(model, cache, token.view(1, 1))[0] for token in row[90:]])
        assert_close(got, expected)


def test_crop_of_a_ragged_batch(model_of: Any) -> None:
    """`crop` counts columns: a row whose last columns are padding loses fewer tokens."""
    model = model_of("llama")
    rows, steps = [tokens(90, seed=1), tokens(40, seed=2)], tokens(12, seed=3).view(2, 6)
    batch = left_padded(rows)
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, batch["input_ids"], batch["attention_mask"])
        tail = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
        mask = torch.cat([batch["attention_mask"], tail], dim=1)
        feed(model, cache, tokens(8, seed=4).view(2, 4), mask)
        assert [row.length for row in cache.kv.rows] == [94, 41]
        cache.crop(-6)
        assert [row.length for row in cache.kv.rows] == [88, 38]
        mask = mask[:, :-6]
        for step in range(6):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            together = feed(model, cache, steps[:, step : step + 1], mask)
        for index in range(2):
            expected = alone(model, handle, rows[index][:-2], steps[index])
            assert_close(together[index, 0], expected[-1])


@pytest.mark.parametrize("kind", VARIED)
@pytest.mark.parametrize("as_mask", [False, True], ids=["numbers", "booleans"])
def test_batch_select_indices(model_of: Any, kind: str, as_mask: bool) -> None:
    model, steps = model_of(kind), tokens(20, seed=9)
    rows = [tokens(90, seed=row) for row in range(4)]
    indices = torch.tensor([True, False, False, True]) if as_mask else torch.tensor([0, 3])
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, torch.stack(rows))
        cache.batch_select_indices(indices)
        logits = torch.cat([feed(model, cache, token.expand(2, 1)) for token in steps], dim=1)
        for index, row in enumerate((0, 3)):
            assert_close(logits[index], alone(model, handle, rows[row], steps))


@pytest.mark.parametrize("kind", VARIED)
def test_batch_repeat_interleave(model_of: Any, kind: str) -> None:
    """Two rows three times each; the copies part in the middle of a shared page."""
    model = model_of(kind)
    rows, steps = [tokens(90, seed=1), tokens(90, seed=2)], tokens(6 * 20, seed=3).view(6, 20)
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, torch.stack(rows))
        cache.batch_repeat_interleave(3)
        logits = torch.cat([feed(model, cache, steps[:, step : step + 1]) for step in range(20)], dim=1)
        for index in range(6):
            assert_close(logits[index], alone(model, handle, rows[index // 3], steps[index]))


@pytest.mark.parametrize("at_once", [True, False], ids=["chunk", "decode"])
def test_copies_cropped_into_what_they_share(model_of: Any, at_once: bool) -> None:
    """Rows made from one, rolled back by more than a page, then written with different tokens over page edges."""
    model, row = model_of("llama"), tokens(96, seed=1)
    steps = tokens(2 * 40, seed=3).view(2, 40)
    parts = [steps] if at_once else list(steps.split(1, dim=1))
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, row[None])
        cache.batch_repeat_interleave(2)
        cache.crop(-40)
        logits = torch.cat([feed(model, cache, part) for part in parts], dim=1)
        for index in range(2):
            cache = handle.new_cache()
            feed(model, cache, row[None, :56])
            expected = torch.cat([feed(model, cache, part[index : index + 1])[0] for part in parts])
            assert_close(logits[index], expected)


def test_reorder_drops_and_doubles_rows(model_of: Any) -> None:
    model = model_of("llama")
    rows, steps = [tokens(90, seed=row) for row in range(3)], tokens(3 * 20, seed=3).view(3, 20)
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache()
        feed(model, cache, torch.stack(rows))
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        logits = torch.cat([feed(model, cache, steps[:, step : step + 1]) for step in range(20)], dim=1)
        for index, row in enumerate((2, 2, 0)):
            assert_close(logits[index], alone(model, handle, rows[row], steps[index]))


def test_a_cache_moves_from_method_to_method(model_of: Any) -> None:
    """Made under one handle, used under another with the same page size: each decodes in its own way."""
    model, row = model_of("llama"), tokens(110, seed=1)
    with deltakv.apply(model, deltakv.Full()) as handle:
        full = alone(model, handle, row[:100], row[100:])
        cache = handle.new_cache()
        feed(model, cache, row[None, :100])
    with deltakv.apply(model, METHOD) as handle:
        sparse = alone(model, handle, row[:100], row[100:])
        assert not torch.allclose(sparse, full, atol=1e-2)
        got = [feed(model, cache, token.view(1, 1))[0] for token in row[100:]]
        assert_close(torch.cat(got), sparse)
        cache.crop(-10)
    with deltakv.apply(model, deltakv.Full()) as handle:
        got = [feed(model, cache, token.view(1, 1))[0] for token in row[100:]]
        assert_close(torch.cat(got), full)


def test_length_given_ahead_keeps_a_row_in_one_run(model_of: Any) -> None:
    """`max_length` gives each row neighbouring pages at once; without it rows still come out right (other tests)."""
    model = model_of("llama")
    with deltakv.apply(model, METHOD) as handle:
        cache = handle.new_cache(max_length=200)
        batch = ragged(90, 60, 20)
        decode(model, batch, tokens(3 * 40).view(3, 40), cache)
        for row in cache.kv.rows:
            assert row.pages == list(range(row.pages[0], row.pages[0] + 13))
