"""Several turns on one cache: many tokens at once after decoding, and batches whose rows ended at different times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from hf.harness import (
    KINDS,
    SMALL,
    assert_close,
    assert_same_generation,
    decode,
    greedy,
    left_padded,
    positions,
    ragged,
    recorded_picks,
    tokens,
)

COVERING = deltakv.Delta(budget=1024, min_context=0)
#: Models without windows: a window counts columns, gaps included, so only these rows are as if alone.
WITHOUT_WINDOWS = ("llama", "qwen3", "opt")


def next_turn(sequences: Tensor, mask: Tensor, end: int | None, new: Tensor) -> dict[str, Tensor]:
    """The batch of the next turn: all columns so far, then `new` [batch, tokens]; padding after `end` is masked."""
    generated = torch.ones_like(sequences[:, mask.shape[1] :])
    if end is not None:
        answers = sequences[:, mask.shape[1] :]
        generated = ((answers == end).cumsum(1) - (answers == end).long() == 0).long()
    return {
        "input_ids": torch.cat([sequences, new], dim=1),
        "attention_mask": torch.cat([mask, generated, torch.ones_like(new)], dim=1),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_second_turn_of_one_row(model_of: Any, kind: str) -> None:
    model = model_of(kind)

    def talk() -> list[Any]:
        first = greedy(model, ragged(45), 12)
        ids = torch.cat([first.sequences, tokens(30, seed=9)[None]], dim=1)
        # A mask of its own: `generate` would take generated tokens that look like padding for padding.
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = greedy(model, batch, 12, past_key_values=first.past_key_values)
        assert second.past_key_values is first.past_key_values
        return [first, second]

    stock = talk()
    with deltakv.apply(model, COVERING):
        for ours, theirs in zip(talk(), stock, strict=True):
            assert_same_generation(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_three_turns_of_a_batch_that_ends_raggedly(model_of: Any, kind: str) -> None:
    """Rows that finished early were fed padding; the next turn's mask hides it, so the mask has a gap."""
    model, prompt = model_of(kind), ragged(40, 17, 33)
    plain = greedy(model, prompt, 14).sequences
    end = int(plain[1, 40 + 4])  # row 1 ends after a few tokens

    def talk() -> list[Any]:
        mask, turns = prompt["attention_mask"], [greedy(model, prompt, 14, eos_token_id=end)]
        for turn in range(2):
            new = torch.stack([tokens(8, seed=20 + 3 * turn + row) for row in range(3)])
            batch = next_turn(turns[-1].sequences, mask, end, new)
            mask = batch["attention_mask"]
            turns.append(greedy(model, batch, 10, eos_token_id=end, past_key_values=turns[-1].past_key_values))
        return [*turns, mask]

    *stock, mask = talk()
    gaps = (mask[:, 1:] < mask[:, :-1]).any(1)
    assert gaps.any(), "no row has a gap, so nothing is tested"
    with deltakv.apply(model, COVERING):
        *ours, _ = talk()
    for one, other in zip(ours, stock, strict=True):
        assert_same_generation(one, other)


def test_gap_is_not_stored(model_of: Any) -> None:
    """After a turn that hides padding, a row holds its real tokens alone, while transformers counts all columns."""
    model, batch = model_of("llama"), ragged(20, 12)
    continuation = torch.tensor([[5, 6, 7, 8], [9, 2, 0, 0]])
    with deltakv.apply(model, COVERING), torch.no_grad():
        _, cache = decode(model, batch, continuation)
        assert [row.length for row in cache.kv.rows] == [24, 16]
        mask = torch.cat([batch["attention_mask"], torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])], dim=1)
        mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
        model(tokens(6).view(2, 3), attention_mask=mask, past_key_values=cache)
        assert [row.length for row in cache.kv.rows] == [27, 17]
        assert cache.get_seq_length() == 27


@pytest.mark.parametrize("kind", WITHOUT_WINDOWS)
def test_sparse_turns_of_a_ragged_batch_equal_the_rows_alone(model_of: Any, kind: str) -> None:
    """Under sparse, too: each row of three turns with gaps is the row alone, in logits and picks."""
    model, method = model_of(kind), deltakv.Delta(**SMALL, plan="FSRRSR")
    prompts = [tokens(n, seed=40 + n) for n in (90, 35, 120)]
    answers = torch.stack([tokens(6, seed=50 + row) for row in range(3)])
    kept = [6, 2, 4]  # of its answer, each row keeps so many; the rest was padding
    second = torch.stack([tokens(20, seed=60 + row) for row in range(3)])
    final = torch.stack([tokens(9, seed=70 + row) for row in range(3)])

    def talk(rows: list[int], cut: bool) -> tuple[Tensor, Any]:
        """Turn 1: prompt and answer. Turn 2: several tokens at once, then decoding. cut: hide the padding."""
        with deltakv.apply(model, method) as handle, torch.no_grad():
            handle.stats.record_picks = True
            batch = left_padded([prompts[row] for row in rows])
            _, cache = decode(model, batch, answers[rows] if cut else answers[rows][:, : kept[rows[0]]])
            real = torch.ones(len(rows), 6, dtype=torch.long)
            for index, row in enumerate(rows):
                real[index, kept[row] :] = 0
            if not cut:
                real = real[:, : kept[rows[0]]]
            mask = torch.cat([batch["attention_mask"], real, torch.ones(len(rows), 20, dtype=torch.long)], dim=1)
            handle.stats.reset()
            out = model(
                second[rows],
                attention_mask=mask,
                position_ids=positions(mask)[:, -20:],
                past_key_values=cache,
            )
            logits = [out.logits]
            for step in range(9):
                mask = torch.cat([mask, mask[:, -1:]], dim=1)
                out = model(
                    final[rows][:, step : step + 1],
                    attention_mask=mask,
                    position_ids=positions(mask)[:, -1:],
                    past_key_values=cache,
                )
                logits.append(out.logits)
            assert handle.stats.sparse_rows > 0 or rows == [1]
            return torch.cat(logits, dim=1), [recorded_picks(handle, row) for row in range(len(rows))]

    together, picks = talk([0, 1, 2], cut=True)
    for row in range(3):
        alone, picks_alone = talk([row], cut=False)
        assert_close(together[row], alone[0])
        assert picks[row] == picks_alone[0]
