"""Whole models under DELTA against the dense reference of `tests/oracle.py`, and batches against their rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltakv
from hf.harness import (
    KINDS,
    SMALL,
    assert_close,
    assert_equals_oracle,
    decode,
    greedy,
    left_padded,
    ragged,
    recorded_picks,
    tokens,
)
from oracle import DenseDelta

#: Layers that join the plan: all, or those without a window.
DEPTH = dict.fromkeys(KINDS, 6) | {"gpt_oss": 4}
PLANS = {
    6: ["FSRRSR", "SRRRRR", "FFSRFR", "SSRRSS"],
    4: ["FSRR", "SRRR", "SRFR", "SRSR"],
}
DEFAULT = {6: "FSRRSR", 4: "SRSR"}


def small(kind: str, **changes: Any) -> Any:
    return deltakv.Delta(**{**SMALL, "plan": DEFAULT[DEPTH[kind]], **changes})


def run_and_check(model: Any, method: Any, row: torch.Tensor, start: int) -> Any:
    """Prefills `row[:start]`, decodes the rest, and holds logits, picks and counts against the oracle."""
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        logits, _ = decode(model, left_padded([row[:start]]), row[None, start:])
    picks = recorded_picks(handle)
    run = assert_equals_oracle(model, method, str(handle.plan), row, start, logits[0, 1:], picks)
    assert handle.stats.rows == handle.stats.steps == len(row) - start
    assert handle.stats.attended_tokens == run.attended
    assert handle.stats.full_tokens == run.full
    return handle


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_over_page_edges(model_of: Any, kind: str) -> None:
    """From below the budget (dense) over three page edges, one token at a time."""
    handle = run_and_check(model_of(kind), small(kind), tokens(116, seed=1), 60)
    assert handle.stats.sparse_rows == 116 - 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", range(4))
def test_plans(model_of: Any, kind: str, which: int) -> None:
    method = small(kind, plan=PLANS[DEPTH[kind]][which])
    handle = run_and_check(model_of(kind, seed=1), method, tokens(150, seed=which), 138)
    assert handle.stats.sparse_rows == (12 if "R" in str(handle.plan) else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"sinks": 0},
        {"recent": 48},
        {"recent": 64, "sinks": 0},
        {"budget": 16, "recent": 16, "sinks": 0},
        {"min_context": 120},
        {"page_size": 32, "budget": 96, "recent": 32, "sinks": 32},
        {"page_size": 64, "budget": 64, "recent": 64, "sinks": 0},
        {"budget": 112},
        {"budget": 128},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_budgets(model_of: Any, kind: str, changes: dict[str, int]) -> None:
    run_and_check(model_of(kind), small(kind, **changes), tokens(132, seed=3), 110)


@pytest.mark.parametrize("start", [1, 15, 16, 17, 63, 64, 65])
def test_prompt_lengths_at_page_edges(model_of: Any, start: int) -> None:
    run_and_check(model_of("qwen2"), small("qwen2"), tokens(start + 3, seed=start), start)


def test_min_context_is_kept_dense_up_to_and_with_itself(model_of: Any) -> None:
    with deltakv.apply(model_of("llama"), small("llama", min_context=100)) as handle:
        row = tokens(103)
        decode(model_of("llama"), left_padded([row[:97]]), row[None, 97:])
        assert handle.stats.steps == 6
        assert handle.stats.sparse_rows == 3  # 101, 102, 103


@pytest.mark.parametrize(
    ("room", "recorded", "scores"), [(128, False, False), (129, False, True), (129, True, False)]
)  # recorded picks are laid out by the host, whose tables hold what is there and no more
def test_nothing_is_scored_where_no_row_can_lose_a_page(
    model_of: Any, monkeypatch: pytest.MonkeyPatch, room: int, recorded: bool, scores: bool
) -> None:
    """A table for at most `min_context` tokens: Δ-layers attend in full and no more, and the pick is everything."""
    from deltakv.integrations.hf import selecting

    scored: list[bool] = []
    with_statistics = selecting.decode_attention_stats
    monkeypatch.setattr(
        selecting, "decode_attention_stats", lambda *args: scored.append(True) or with_statistics(*args)
    )
    row, model = tokens(60)[None], model_of("llama")
    with torch.no_grad(), deltakv.apply(model, small("llama", min_context=128)) as handle:
        handle.stats.record_picks = recorded
        cache = handle.new_cache(room)
        model(row[:, :50], past_key_values=cache)
        ours = torch.cat([model(row[:, i : i + 1], past_key_values=cache).logits for i in range(50, 60)], 1)
        assert bool(scored) == scores
        assert handle.stats.attended_tokens == handle.stats.full_tokens > 0
        for step, _layer, pages, n_kept in handle.stats.picks:
            count = -(-(51 + step) // 16)
            assert n_kept.tolist() == [count] and pages[0].tolist()[:count] == list(range(count))
            assert not pages[0, count:].any()
        assert len(handle.stats.picks) == recorded * 10 * str(handle.plan).count("S")
    with torch.no_grad(), deltakv.apply(model, deltakv.Full()) as handle:
        cache = handle.new_cache(room)
        model(row[:, :50], past_key_values=cache)
        full = torch.cat([model(row[:, i : i + 1], past_key_values=cache).logits for i in range(50, 60)], 1)
    assert torch.equal(ours, full)


def test_greedy_generation_is_the_oracle_s(model_of: Any) -> None:
    """`generate` under DELTA: every logit of its own continuation is the dense reference's."""
    model, method = model_of("llama"), small("llama")
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        out = greedy(model, ragged(90), 30)
    picks = recorded_picks(handle)
    # The last generated token is never fed, the first comes from the prompt's full attention.
    assert_equals_oracle(model, method, "FSRRSR", out.sequences[0, :-1], 90, out.logits[1:, 0], picks)


def test_sparse_is_not_dense(model_of: Any) -> None:
    """The tests above could not fail if tiny models did not care what they read."""
    for kind in KINDS:
        row = tokens(140, seed=2)
        with deltakv.apply(model_of(kind), deltakv.Full()):
            full, _ = decode(model_of(kind), left_padded([row[:136]]), row[None, 136:])
        with deltakv.apply(model_of(kind), small(kind)):
            sparse, _ = decode(model_of(kind), left_padded([row[:136]]), row[None, 136:])
        assert torch.equal(full[:, 0], sparse[:, 0])
        assert (full - sparse)[:, 1:].abs().max() > 0.01, kind


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch_equals_its_rows_alone(model_of: Any, kind: str) -> None:
    """Left-padded rows, some dense and some sparse, at different places of their pages."""
    model, method = model_of(kind), small(kind)
    rows = [tokens(n, seed=n) for n in (131, 17, 80, 63, 1)]
    continuation = torch.stack([tokens(18, seed=200 + index) for index in range(len(rows))])
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        together, _ = decode(model, left_padded(rows), continuation)
        picks = [recorded_picks(handle, row) for row in range(len(rows))]
        counts = (handle.stats.attended_tokens, handle.stats.full_tokens, handle.stats.sparse_rows)
        handle.stats.reset()
        assert handle.stats.record_picks
        for index, row in enumerate(rows):
            handle.stats.picks.clear()
            alone, _ = decode(model, left_padded([row]), continuation[index : index + 1])
            assert_close(together[index], alone[0])
            assert picks[index] == recorded_picks(handle)
        assert (handle.stats.attended_tokens, handle.stats.full_tokens, handle.stats.sparse_rows) == counts
    assert handle.stats.sparse_rows == 18 + 0 + 18 + 17 + 0


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3"])
def test_ragged_generation_equals_its_rows_alone(model_of: Any, kind: str) -> None:
    model, rows = model_of(kind), [tokens(n, seed=n) for n in (100, 20, 70)]
    with deltakv.apply(model, small(kind)):
        together = greedy(model, left_padded(rows), 20)
        for index, row in enumerate(rows):
            alone = greedy(model, left_padded([row]), 20)
            assert_close(together.logits[:, index], alone.logits[:, 0])
            assert torch.equal(together.sequences[index, 100:], alone.sequences[0, len(row) :])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_beams(model_of: Any, kind: str) -> None:
    """Beams share pages until they part. Each one that survives must have seen exactly its own history.

    The sum of log-probabilities along a beam's tokens, decoded alone by hand, is the score that the search gave it.
    """
    model, rows, count = model_of(kind), [tokens(85, seed=1), tokens(40, seed=2)], 30
    with deltakv.apply(model, small(kind)) as handle, torch.no_grad():
        out = model.generate(
            **left_padded(rows),
            max_new_tokens=count,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert handle.stats.sparse_rows > 0
        changed = (out.beam_indices[:, 1:] != out.beam_indices[:, :-1]).any(1)
        assert changed.any(), "no beam ever changed its place"
        for index in range(6):
            row, beam = rows[index // 3], out.sequences[index, 85:]
            logits, _ = decode(model, left_padded([row]), beam[None, :-1])
            taken = logits[0].log_softmax(-1).gather(1, beam[:, None])
            torch.testing.assert_close(taken.sum(), out.sequences_scores[index], atol=1e-3, rtol=0)


def test_second_turn(model_of: Any) -> None:
    """Prefill, decode, a prefill of many tokens (full attention everywhere), decode: each part as the oracle says."""
    model, method, row = model_of("llama"), small("llama"), tokens(160, seed=8)
    parts = [row[:70], row[70:90], row[90:127], row[127:]]
    with deltakv.apply(model, method) as handle, torch.no_grad():
        handle.stats.record_picks = True
        first, cache = decode(model, left_padded([parts[0]]), parts[1][None])
        mask = torch.ones(1, 127, dtype=torch.long)
        middle = model(parts[2][None], attention_mask=mask, past_key_values=cache).logits
        assert handle.stats.steps == 20
        last = [model(token.view(1, 1), past_key_values=cache).logits[:, -1] for token in parts[3]]
    picks = recorded_picks(handle)
    everything = list(range(10))
    # Positions of the second prefill see all pages.
    given = {layer: [*chosen[:20], *[everything] * 37, *chosen[20:]] for layer, chosen in picks.items()}
    run = DenseDelta(model, "FSRRSR", **SMALL)(row, 70, given)
    assert_close(first[0, 1:], run.logits[70:90])
    assert_close(middle[0], run.logits[90:127])
    assert_close(torch.cat(last), run.logits[127:])
    for layer, chosen in picks.items():
        assert chosen[:20] == run.picks[layer][:20]
        assert chosen[20:] == run.picks[layer][57:]


def test_num_return_sequences_share_no_fate(model_of: Any) -> None:
    """Samples from one prompt: each is what its own tokens give alone."""
    model, row = model_of("llama"), tokens(85, seed=1)
    torch.manual_seed(1)
    with deltakv.apply(model, small("llama")), torch.no_grad():
        out = model.generate(
            row[None],
            max_new_tokens=20,
            do_sample=True,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.stack(out.logits, dim=1)
        assert len({tuple(s.tolist()) for s in out.sequences}) == 3
        for index in range(3):
            alone, _ = decode(model, left_padded([row]), out.sequences[index : index + 1, 85:-1])
            assert_close(logits[index], alone[0])


def test_prompt_lookup_verifies_in_full(model_of: Any) -> None:
    """Assisted decoding checks candidates with full attention, so its text may differ; it is as long as asked for."""
    model = model_of("llama")
    with deltakv.apply(model, small("llama")):
        out = greedy(model, left_padded([tokens(20).repeat(5)]), 20, prompt_lookup_num_tokens=3)
    assert out.sequences.shape == (1, 120)
