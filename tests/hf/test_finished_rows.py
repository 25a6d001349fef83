"""Rows that end before the others, at steps that keep their books on the device: they stop growing, or go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

import deltakv
from hf.harness import assert_close, assert_same_generation, decode, greedy, ragged, tokens
from hf.on_device import COVERING, KINDS, SPARSE, Looking, an_end, lengths


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_stop_growing(model_of: Any, kind: str, recorded: bool) -> None:
    """And are not counted; their neighbours see no difference, to the bit."""
    model, batch = model_of(kind), ragged(90, 70, 80)
    with deltakv.apply(model, SPARSE) as handle:
        handle.stats.record_picks = recorded
        end, made = an_end(model, batch)
        plain = greedy(model, batch, 20)
        handle.stats.reset()
        ended = greedy(model, batch, 20, eos_token_id=end)
        fed = [min(count, 19) for count in made]
        assert lengths(ended.past_key_values) == [90 + fed[0], 70 + fed[1], 80 + fed[2]]  # with the end token
        assert ended.past_key_values.get_seq_length() == 109
        assert (handle.stats.steps, handle.stats.rows) == (19, sum(fed))
    for row, count in enumerate(made):
        assert torch.equal(ended.logits[: count + 1, row], plain.logits[: count + 1, row])
        assert ended.sequences[row, 90 + count :].tolist() == [0] * (20 - count)


@pytest.mark.parametrize("kind", KINDS)
def test_second_turn(model_of: Any, kind: str) -> None:
    """The end token is stored, the padding behind it is not; masks that show it are refused, and so are none."""
    model, batch, new = model_of(kind), ragged(40, 24), tokens(10).view(2, 5)
    end, made = an_end(model, batch, steps=12)
    fed = [min(count, 11) for count in made]

    def turns() -> Iterator[Any]:
        first = greedy(model, batch, 12, eos_token_id=end)
        yield first
        ids = torch.cat([first.sequences, new], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 17, dtype=torch.long)], dim=1)
        for row, count in enumerate(made):
            mask[row, 40 + count : 52] = 0
        yield greedy(model, {"input_ids": ids, "attention_mask": mask}, 6, past_key_values=first.past_key_values)

    stock = list(turns())
    with deltakv.apply(model, COVERING) as handle, torch.no_grad():
        ours = turns()
        first = next(ours)
        assert_same_generation(first, stock[0])
        for shown in ({}, {"attention_mask": torch.ones(2, 56, dtype=torch.long)}):
            with pytest.raises(deltakv.MaskError):
                model(new, past_key_values=first.past_key_values, **shown)
        with pytest.raises(deltakv.MaskError):
            model(new[:, :1], past_key_values=first.past_key_values)
        assert lengths(first.past_key_values) == [40 + fed[0], 24 + fed[1]]
        assert_same_generation(next(ours), stock[1])
        assert handle.stats.rows == sum(fed) + 2 * 5


def test_without_an_end_token_rows_go_on(model_of: Any) -> None:
    """Stock `generate` then returns what rows say after a criterion has stopped them."""
    model, batch = model_of("llama"), ragged(30, 18)

    class LastIsSmall(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return input_ids[:, -1] < 10

    stock = greedy(model, batch, 30, stopping_criteria=[LastIsSmall()])
    stopped = [int((row[30:] < 10).nonzero()[0]) for row in stock.sequences]
    assert max(stopped) > min(stopped) + 2
    with deltakv.apply(model, COVERING) as handle:
        ours = greedy(model, batch, 30, stopping_criteria=[LastIsSmall()])
        assert lengths(ours.past_key_values) == [30 + max(stopped), 18 + max(stopped)]
        assert handle.stats.rows == 2 * max(stopped)
    assert_same_generation(ours, stock)


@pytest.mark.parametrize("look", ["kv_bytes", "record_picks", "positions", "another generate"])
def test_somebody_looks_in_between(model_of: Any, look: str) -> None:
    """The host catches up in the middle of `generate`, or takes over; rows that have ended stay so."""
    model, batch = model_of("llama"), ragged(30, 18)
    with deltakv.apply(model, COVERING) as handle:
        end, made = an_end(model, batch)
        fed = [min(count, 19) for count in made]
        want = greedy(model, batch, 20, eos_token_id=end)
        handle.stats.reset()
        watching = handle.positions()

        def looking(columns: int) -> None:
            if look == "kv_bytes":
                assert handle.cache is not None and handle.cache.kv_bytes > 0
            elif look == "record_picks":
                handle.stats.record_picks = columns in (40, 41, 44)
            elif look == "positions" and columns in (40, 42):
                watching.__enter__() if columns == 40 else watching.__exit__(None, None, None)
            elif look == "another generate" and columns in (34, 35, 40, 41):
                greedy(model, ragged(9, 7, 5), 3)

        got = greedy(model, batch, 20, eos_token_id=end, stopping_criteria=[Looking(looking)])
        assert lengths(got.past_key_values) == lengths(want.past_key_values) == [30 + fed[0], 18 + fed[1]]
        assert handle.stats.rows == sum(fed) + (4 * 3 * 2 if look == "another generate" else 0)
        assert len({step for step, *_ in handle.stats.picks}) == (3 if look == "record_picks" else 0)
    assert_same_generation(got, want)


@pytest.mark.parametrize("announce", [False, True])
def test_a_plain_loop_goes_on_with_all_rows(model_of: Any, announce: bool) -> None:
    """Rows that ended because `generate` was at its length, or whose end token was its last, have not finished."""
    model, batch, new = model_of("llama"), ragged(40, 40), tokens(12).view(2, 6)

    def talk(handle: Any, count: int) -> Tensor:
        out = greedy(model, batch, count, eos_token_id=127)
        logits = []
        for token in new.T[..., None]:
            if handle is not None and announce:
                assert handle.announce(out.past_key_values)
            logits.append(model(token, past_key_values=out.past_key_values).logits)
        assert handle is None or lengths(out.past_key_values) == [40 + count - 1 + 6] * 2
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        stock = [talk(None, count) for count in (1, 6)]
        with deltakv.apply(model, COVERING) as handle:
            for count, expected in zip((1, 6), stock, strict=True):
                assert_close(talk(handle, count), expected)


def test_the_next_generate_goes_on_with_all_rows(model_of: Any) -> None:
    """A turn of one token, which ends all rows, and one without an end token."""
    model, batch = model_of("llama"), ragged(40, 40)

    def turns() -> Iterator[Any]:
        first = greedy(model, batch, 1, eos_token_id=127)
        yield first
        ids = first.sequences
        new = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield greedy(model, new, 9, past_key_values=first.past_key_values)

    stock = list(turns())
    with deltakv.apply(model, COVERING):
        for ours, theirs in zip(turns(), stock, strict=True):
            assert_same_generation(ours, theirs)


def test_announced_by_hand(model_of: Any) -> None:
    """`finished` holds for one forward: what rows are fed is not stored, and costs nothing."""
    model, batch, new = model_of("llama"), ragged(90, 70), tokens(12).view(2, 6)
    with deltakv.apply(model, SPARSE) as handle, torch.no_grad():
        _, cache = decode(model, batch, new[:, :0])
        kept = [3, 1, 2]  # tokens of each stretch; in the second, row 0 is finished
        logits = []
        for step, token in enumerate(new.T[..., None]):
            finished = torch.tensor([True, False]) if step == 3 else None
            assert handle.announce(cache, finished)
            logits.append(model(token, past_key_values=cache).logits[:, 0])
        assert lengths(cache) == [90 + 5, 70 + 6] and handle.stats.rows == sum(kept) * 2 - 1
        alone = [
            decode(model, {name: x[row : row + 1, start:] for name, x in batch.items()}, fed[None])[0][0, 1:]
            for row, start, fed in ((0, 0, new[0, [0, 1, 2, 4, 5]]), (1, 20, new[1]))
        ]
    assert_close(torch.stack(logits)[[0, 1, 2, 4, 5], 0], alone[0])
    assert_close(torch.stack(logits)[:, 1], alone[1])
