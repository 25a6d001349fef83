"""Operations on a cache whose books are on the device, each followed by more decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from hf.harness import assert_close, failing_layer, greedy, positions, ragged, tokens
from hf.on_device import COVERING, SPARSE, Looking, counted, lengths


@pytest.mark.parametrize("cache", [{}, {"max_length": 200}, {"max_length": 200, "static": True}], ids=str)
def test_of_decoding(talk: Any, cache: dict[str, Any]) -> None:
    it = talk(30, 30, cache=cache)
    for operation in ("crop", "reorder", "repeat", "select", "copy", "look"):
        it.steps(3, masked=False)
        assert it.cache.decoding
        it.handle.announce(it.cache)  # and no forward comes
        if operation == "crop":
            it.cache.crop(-5)
            it.drop(5)
        elif operation == "reorder":
            it.cache.reorder_cache(torch.tensor([1, 1]))
            it.rows([1, 1])
        elif operation == "repeat":
            it.cache.batch_repeat_interleave(2)
            it.rows([0, 0, 1, 1])
        elif operation == "select":
            it.cache.batch_select_indices(torch.tensor([0, 3]))
            it.rows([0, 3])
        elif operation == "copy":
            twin, left = copy.deepcopy(it.cache), lengths(it.cache)
            it.cache, first = twin, it.cache
            it.steps(20, masked=False)
            assert it.handle.stats.kv_bytes == twin.kv_bytes
            assert lengths(first) == left
        else:
            assert it.cache.kv_bytes == it.handle.stats.kv_bytes > 0
            assert lengths(it.cache) == [it.ids.shape[1]] * 2
        it.steps(20, masked=False)
    it.handle.announce(it.cache)
    it.cache.reset()
    assert it.cache.get_seq_length() == 0 and not it.handle.announce(it.cache)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_of_all_kinds_of_calls(talk: Any, kind: str) -> None:
    """With and without a mask, of many tokens, in evaluation mode, with recorded picks, in inference mode."""
    it = talk(25, 25, kind=kind)
    for turn in range(3):
        it.steps(5, masked=False)
        it.steps(2, masked=True)
        it.steps(4, masked=False, announce=True)
        it.say(tokens(18, seed=turn).view(2, 9), masked=turn == 0)
        it.handle.announce(it.cache)  # overtaken by what follows
        with it.handle.positions(picks=True) as trace:
            assert not it.handle.announce(it.cache)
            it.steps(2, masked=False)
            it.say(tokens(6, seed=turn).view(2, 3), masked=False)
        assert [len(picks) for picks in trace.picks.values()] == [10] * len(trace.picks) and trace.picks
        it.steps(1, masked=False)
        it.handle.announce(it.cache)
        it.handle.stats.record_picks = True
        it.steps(2, masked=False)
        it.handle.stats.record_picks = False
        with torch.inference_mode():
            it.steps(20, masked=False)
        with torch.enable_grad():
            it.steps(1, masked=False)
    # 37 steps of 2 rows a turn, and as many positions as evaluation mode saw.
    assert (it.handle.stats.rows, it.handle.stats.steps) == (3 * (2 * 35 + 10), 3 * (35 + 3))
    assert len({step for step, *_ in it.handle.stats.picks}) == 3 * 2
    assert lengths(it.cache) == [it.ids.shape[1]] * 2


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_ragged_rows_announced_or_masked(talk: Any, kind: str) -> None:
    it = talk(30, 12, 21, kind=kind)
    for _ in range(3):
        it.steps(3, masked=True)
        it.steps(20, masked=False, announce=True)
        with pytest.raises(deltakv.MaskError):
            it.model(torch.full((3, 1), 5), past_key_values=it.cache)


def test_a_layer_that_fails(talk: Any) -> None:
    """An announced forward that failed leaves nothing behind, whatever comes next."""
    it = talk(30, 30)
    for step in range(12):
        it.steps(3, masked=False)
        before = it.handle.stats.rows, it.cache.get_seq_length()
        with failing_layer(it.model, layer=step % 6), pytest.raises(RuntimeError, match="in the middle"):
            it.say(torch.full((2, 1), 5), masked=False, announce=step % 2 == 0)
        it.drop(1)
        assert (it.handle.stats.rows, it.cache.get_seq_length()) == before
        if step % 3 == 0:
            assert lengths(it.cache) == [it.ids.shape[1]] * 2
        it.steps(step % 3, masked=step % 4 == 0)


def test_a_layer_that_fails_in_generate(model_of: Any) -> None:
    """The user's cache stands where it stood, and the next turn goes on from there."""
    model, batch = model_of("llama"), ragged(30, 18)
    stock = greedy(model, batch, 12)
    with deltakv.apply(model, COVERING) as handle:
        cache, failing = handle.new_cache(), failing_layer(model)
        fail = Looking(lambda columns: failing.__enter__() if columns == 38 else None)
        with pytest.raises(RuntimeError, match="in the middle"):
            greedy(model, batch, 12, past_key_values=cache, stopping_criteria=[fail])
        failing.__exit__(None, None, None)
        assert lengths(cache) == [37, 25] and cache.get_seq_length() == 37
        assert (handle.stats.steps, handle.stats.rows) == (7, 14)
        ids = stock.sequences[:, :38]
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)
        rest = greedy(model, {"input_ids": ids, "attention_mask": mask}, 4, past_key_values=cache)
    assert torch.equal(rest.sequences, stock.sequences)
    assert_close(rest.logits, stock.logits[8:])


def test_growth(model_of: Any) -> None:
    """A cache that knows no length is laid out anew as it grows, and gives the bits of a reserved one."""
    model, batch, new = model_of("llama"), ragged(70, 70), tokens(200).view(2, 100)
    with deltakv.apply(model, SPARSE) as handle, torch.no_grad():
        runs = []
        for cache in (handle.new_cache(), handle.new_cache(170), handle.new_cache(100, static=True)):
            handle.stats.reset()
            model(batch["input_ids"], past_key_values=cache)
            layouts, logits = set(), []
            for token in new.T[..., None]:
                logits.append(model(token, past_key_values=cache).logits)
                layouts.add(cache.state.kv.pool.k[0].data_ptr())
                pages = 2 * -(-(70 + len(logits)) // 16)
                assert handle.stats.kv_bytes == pages * cache.state.kv.pool.bytes_a_page()
            runs.append((torch.cat(logits, dim=1), counted(handle), len(layouts)))
            assert lengths(cache) == [170, 170] and handle.stats.kv_bytes == cache.kv_bytes
    (grown, stats, layouts), (reserved, want, one), (outgrown, *_) = runs
    assert layouts > one
    assert torch.equal(grown, reserved) and torch.equal(outgrown, reserved)
    assert stats == want


def test_a_batch_of_another_size_is_refused(talk: Any) -> None:
    """Also where a forward of one row could be taken for one of them all."""
    it = talk(20, 20)
    for rows in (1, 3):
        it.handle.announce(it.cache)
        with pytest.raises(deltakv.UnsupportedUseError, match=f"2 rows, but this forward has {rows}"):
            it.model(torch.full((rows, 1), 5), past_key_values=it.cache)
    it.steps(2, masked=False)


def test_inputs_prepared_by_the_user_keep_their_mask(model_of: Any) -> None:
    """After `generate`, in a loop of one's own: the mask may drop the end of a row."""
    model, batch = model_of("llama"), ragged(30, 18)

    def talk() -> tuple[Tensor, Any]:
        out = greedy(model, batch, 6)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
        mask[1, -3:-1] = 0
        cache, ids = out.past_key_values, positions(mask)
        inputs = model.prepare_inputs_for_generation(
            out.sequences, next_sequence_length=1, past_key_values=cache, attention_mask=mask, position_ids=ids
        )
        with torch.no_grad():
            return model(**inputs).logits, cache

    stock, _ = talk()
    with deltakv.apply(model, COVERING):
        ours, cache = talk()
        assert lengths(cache) == [36, 22]
    assert_close(ours, stock)
