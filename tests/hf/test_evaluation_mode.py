"""Evaluation mode: one forward in which each position picks for itself equals decoding them one at a time."""

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
    assert_equals_oracle,
    decode,
    failing_layer,
    left_padded,
    positions,
    recorded_picks,
    tokens,
)

DEPTH = dict.fromkeys(KINDS, 6) | {"gpt_oss": 4}


def small(kind: str, **changes: Any) -> Any:
    return deltakv.Delta(**{**SMALL, "plan": "FSRRSR" if DEPTH[kind] == 6 else "SRSR", **changes})


@torch.no_grad()
def evaluate(model: Any, handle: Any, row: Tensor, start: int, chunks: list[int], **want: bool) -> tuple[Tensor, Any]:
    """Prefill of `row[:start]`, then the rest in evaluation mode, in chunks: logits [T - start, vocab] and trace."""
    cache = model(row[None, :start]).past_key_values
    handle.stats.reset()
    with handle.positions(**want) as trace:
        parts = [model(part[None], past_key_values=cache).logits[0] for part in row[start:].split(chunks)]
    return torch.cat(parts), trace


@pytest.mark.parametrize("kind", KINDS)
def test_equals_true_decoding_and_the_oracle(model_of: Any, kind: str) -> None:
    model, method, row = model_of(kind), small(kind), tokens(116, seed=1)
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        decoded, _ = decode(model, left_padded([row[:60]]), row[None, 60:])
        picks = recorded_picks(handle)
        counts = [getattr(handle.stats, name) for name in ("rows", "sparse_rows", "attended_tokens", "full_tokens")]
        logits, trace = evaluate(model, handle, row, 60, [56], picks=True, recall=True)
        evaluated = [getattr(handle.stats, name) for name in ("rows", "sparse_rows", "attended_tokens", "full_tokens")]
    assert_close(logits, decoded[0, 1:])
    assert {layer: [p.tolist() for p in chosen] for layer, chosen in trace.picks.items()} == picks
    assert evaluated == counts
    run = assert_equals_oracle(model, method, str(handle.plan), row, 60, logits, picks)
    assert trace.recall == pytest.approx(run.recall, abs=1e-4)
    reuse = {handle.planned_layers[layer] for layer in handle.plan.layers(deltakv.Role.REUSE)}
    assert set(trace.recall) == reuse
    # Learned sinks take mass that is on no token, so only models without them can reach 1.
    assert all(0 < share < 1 for share in trace.recall.values())


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma3"])
@pytest.mark.parametrize("chunks", [[20, 36], [55, 1], [1, 54, 1]], ids=str)
def test_chunks_of_any_size(model_of: Any, kind: str, chunks: list[int]) -> None:
    """Chunks continue each other, and one of a single token is one more position in the trace."""
    model, method, row = model_of(kind), small(kind), tokens(131, seed=2)
    with deltakv.apply(model, method) as handle:
        whole, once = evaluate(model, handle, row, 75, [56], picks=True, recall=True)
        attended = handle.stats.attended_tokens
        parts, trace = evaluate(model, handle, row, 75, chunks, picks=True, recall=True)
        assert handle.stats.rows == 56
        assert handle.stats.attended_tokens == attended
    assert_close(parts, whole)
    assert {k: [p.tolist() for p in v] for k, v in trace.picks.items()} == {
        k: [p.tolist() for p in v] for k, v in once.picks.items()
    }
    assert trace.recall == pytest.approx(once.recall, abs=1e-5)


def test_more_positions_than_a_block(model_of: Any) -> None:
    """Logits are held for 64 positions at a time; 150 positions cross two of these edges."""
    model, method, row = model_of("llama"), small("llama"), tokens(200, seed=5)
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        decoded, _ = decode(model, left_padded([row[:50]]), row[None, 50:])
        picks = recorded_picks(handle)
        logits, trace = evaluate(model, handle, row, 50, [150], picks=True)
    assert_close(logits, decoded[0, 1:])
    assert {layer: [p.tolist() for p in chosen] for layer, chosen in trace.picks.items()} == picks
    assert trace.recall == {}


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_ragged_batch(model_of: Any, kind: str) -> None:
    """Rows of different lengths, each position as its row alone."""
    model, method = model_of(kind), small(kind)
    rows = [tokens(n, seed=n) for n in (90, 30, 66)]
    new = torch.stack([tokens(12, seed=100 + index) for index in range(3)])
    batch = left_padded(rows)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 12, dtype=torch.long)], dim=1)
    with deltakv.apply(model, method) as handle, torch.no_grad():
        cache = model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions(batch["attention_mask"]),
        ).past_key_values
        with handle.positions(picks=True) as trace:
            together = model(
                new, attention_mask=mask, position_ids=positions(mask)[:, -12:], past_key_values=cache
            ).logits
        counts = (handle.stats.rows, handle.stats.sparse_rows, handle.stats.attended_tokens)
        handle.stats.reset()
        alone = [
            evaluate_alone(model, handle, row, more, counts_into=handle) for row, more in zip(rows, new, strict=True)
        ]
        for index in range(3):
            assert_close(together[index], alone[index][0])
        for layer, chosen in trace.picks.items():
            one_by_one = [p.tolist() for _, part in alone for p in part.picks[layer]]
            assert [p.tolist() for p in chosen] == one_by_one
        assert (handle.stats.rows, handle.stats.sparse_rows, handle.stats.attended_tokens) == counts


def evaluate_alone(model: Any, handle: Any, row: Tensor, more: Tensor, counts_into: Any) -> tuple[Tensor, Any]:
    """One row's new tokens in evaluation mode, without resetting the counts."""
    cache = model(row[None]).past_key_values
    with handle.positions(picks=True) as trace:
        return model(more[None], past_key_values=cache).logits[0], trace


def test_full_attention_in_evaluation_mode_is_one_forward(model_of: Any) -> None:
    model, row = model_of("qwen3"), tokens(120)
    with torch.no_grad():
        stock = model(row[None]).logits[0, 80:]
    with deltakv.apply(model, deltakv.Full()) as handle:
        logits, trace = evaluate(model, handle, row, 80, [40], picks=True, recall=True)
        assert handle.stats.rows == 40
        assert handle.stats.attended_tokens == handle.stats.full_tokens == 6 * sum(range(81, 121))
        assert handle.stats.sparse_rows == 0
    assert_close(logits, stock)
    assert trace.picks == {} and trace.recall == {}


def test_recall_is_one_where_everything_is_kept(model_of: Any) -> None:
    model, row = model_of("llama"), tokens(60)
    with deltakv.apply(model, small("llama")) as handle:
        _, trace = evaluate(model, handle, row, 40, [20], recall=True)
        assert handle.stats.sparse_rows == 0
    assert trace.recall == pytest.approx({2: 1.0, 3: 1.0, 5: 1.0}, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss"])
def test_one_prefill_for_many_methods(model_of: Any, kind: str) -> None:
    """What `compare` does: prefill once, then for each method apply, evaluate, crop back."""
    model, row = model_of(kind), tokens(130, seed=4)
    methods = [small(kind), small(kind, sinks=0), small(kind, budget=32), deltakv.Full(), small(kind)]
    expected = []
    for method in methods:
        with deltakv.apply(model, method) as handle:
            expected.append(evaluate(model, handle, row, 100, [30])[0])
    with deltakv.apply(model, deltakv.Full()) as handle, torch.no_grad():
        cache = handle.new_cache(croppable=True)
        model(row[None, :100], past_key_values=cache)
    for method, logits in zip(methods, expected, strict=True):
        with deltakv.apply(model, method) as handle, torch.no_grad():
            with handle.positions():
                ours = model(row[None, 100:], past_key_values=cache).logits[0]
            cache.crop(-30)
        assert cache.get_seq_length() == 100
        assert_close(ours, logits)


def test_outside_of_the_block_a_chunk_is_full_attention(model_of: Any) -> None:
    model, row = model_of("llama"), tokens(120)
    with torch.no_grad():
        stock = model(row[None]).logits[0]
        with deltakv.apply(model, small("llama")) as handle:
            cache = model(row[None, :80]).past_key_values
            with handle.positions():
                pass
            assert_close(model(row[None, 80:], past_key_values=cache).logits[0], stock[80:])
            assert handle.stats.rows == 0


def test_nesting_is_refused_and_an_exception_ends_it(model_of: Any) -> None:
    model = model_of("llama")
    with deltakv.apply(model, small("llama")) as handle:
        with (
            pytest.raises(deltakv.UnsupportedUseError, match="evaluation mode is already on"),
            handle.positions(),
            handle.positions(),
        ):
            pass
        with handle.positions():
            pass


def test_a_failed_forward_leaves_no_counts_behind(model_of: Any) -> None:
    """After an error in the middle of an evaluation, the next one counts and traces as if it had not happened."""
    model, row = model_of("llama"), tokens(120, seed=6)

    with deltakv.apply(model, small("llama")) as handle, torch.no_grad():
        expected, clean = evaluate(model, handle, row, 90, [30], picks=True, recall=True)
        attended = handle.stats.attended_tokens
        cache = model(row[None, :90]).past_key_values
        handle.stats.reset()
        with handle.positions(picks=True, recall=True) as trace:
            with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"):
                model(row[None, 90:], past_key_values=cache)
            logits = model(row[None, 90:], past_key_values=cache).logits[0]
        assert_close(logits, expected)
        assert handle.stats.rows == 30
        assert handle.stats.attended_tokens == attended
        assert {k: [p.tolist() for p in v] for k, v in trace.picks.items()} == {
            k: [p.tolist() for p in v] for k, v in clean.picks.items()
        }
        assert trace.recall == pytest.approx(clean.recall, abs=1e-6)
