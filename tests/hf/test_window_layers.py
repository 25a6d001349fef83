"""WINDOW layers against the dense reference, on every path on which a plan is obeyed: steps that the host lays out,
steps whose books are on the device, compiled ones, evaluation mode."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import deltakv
from hf.harness import SMALL, assert_close, assert_equals_oracle, decode, greedy, left_padded, recorded_picks, tokens
from hf.on_device import an_end
from hf.test_methods import assert_is_the_oracle_s, counts, evaluate
from hf.test_methods import small as small_method

PLANS = {6: ["WWWSRR", "FSWRSW", "WWWWWW", "WFSRWR"], 4: ["WSRW", "SWRR", "WWWW", "FWSR"]}
DEPTH = {"llama": 6, "qwen3": 6, "opt": 6, "gemma3": 6, "gpt_oss": 4}

#: WINDOW layers before, between and behind picks.
METHOD = deltakv.Delta(**SMALL, plan="WSRWRF")


def check_all_paths(model: Any, method: Any, row: torch.Tensor, start: int) -> int:
    """Decodes `row` from `start` on, by masks, without, and in evaluation mode: each as the oracle says. Returns how
    many positions were sparse."""
    with deltakv.apply(model, method) as handle, torch.no_grad():
        handle.stats.record_picks = True
        logits, _ = decode(model, left_padded([row[:start]]), row[None, start:])
        picks, counted = recorded_picks(handle), counts(handle)
        run = assert_equals_oracle(model, method, str(handle.plan), row, start, logits[0, 1:], picks)
        assert (counted[0], *counted[2:]) == (len(row) - start, run.attended, run.full)

        handle.stats.record_picks = False
        handle.stats.reset()
        cache = model(row[None, :start]).past_key_values
        steps = [model(token.view(1, 1), past_key_values=cache).logits[0] for token in row[start:]]
        assert_close(torch.cat(steps), logits[0, 1:])
        assert counts(handle) == counted

        evaluated, trace = evaluate(model, handle, row, start, [len(row) - start], picks=True, recall=True)
        assert_close(evaluated, logits[0, 1:])
        assert {layer: [p.tolist() for p in chosen] for layer, chosen in trace.picks.items()} == picks
        assert counts(handle) == counted
        assert trace.recall == pytest.approx(run.recall, abs=1e-4)
    return counted[1]


@pytest.mark.parametrize("kind", DEPTH)
@pytest.mark.parametrize("which", range(4))
def test_plans(model_of: Any, kind: str, which: int) -> None:
    """One token at a time, from below the budget over three page edges."""
    method = deltakv.Delta(**SMALL, plan=PLANS[DEPTH[kind]][which])
    assert check_all_paths(model_of(kind), method, tokens(116, seed=which), 60) == 116 - 64


@pytest.mark.parametrize("seed", range(16))
def test_any_settings(model_of: Any, seed: int) -> None:
    draw = random.Random(seed)
    page, sinks, recent = draw.choice([16, 16, 32]), draw.randrange(3), draw.randrange(1, 3)
    plan = "R"
    while "W" not in plan or ("R" in plan and "S" not in plan[: plan.index("R")]):
        plan = "".join(draw.choices("FSRWW", k=6))
    method = deltakv.Delta(
        page_size=page, sinks=sinks * page, recent=recent * page, budget=(sinks + recent + draw.randrange(3)) * page,
        min_context=draw.choice([0, 0, 90]), plan=plan,
    )  # fmt: skip
    start = draw.randrange(1, 150)
    check_all_paths(model_of("llama", seed=1), method, tokens(start + 14, seed=seed), start)


@pytest.mark.parametrize("name", ["quest", "tidal", "lessismore", "tactic", "tokenselect", "refreshkv", "indexcache"])
def test_other_methods(model_of: Any, name: str) -> None:
    """Every method with a budget has them, whatever its own picks rest on."""
    model, method, row = model_of("llama"), small_method(name, "llama", plan="WSRWSW"), tokens(125, seed=3)
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        logits, _ = decode(model, left_padded([row[:75]]), row[None, 75:])
        recorded, counted = recorded_picks(handle), counts(handle)
        run, _ = assert_is_the_oracle_s(model, name, method, row, 75, logits[0, 1:], recorded)
        assert counted[2:] == (run.attended, run.full)
        handle.stats.record_picks = False
        evaluated, trace = evaluate(model, handle, row, 75, [30, 20], recall=True)
        assert_close(evaluated, logits[0, 1:])
        assert counts(handle) == counted
        assert trace.recall == pytest.approx(run.recall, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_ragged_batch_equals_its_rows_alone(model_of: Any, kind: str) -> None:
    """Left-padded rows, some dense and some sparse, at different places of their pages."""
    model, method = model_of(kind), deltakv.Delta(**SMALL | {"min_context": 90}, plan="WWSRWR")
    rows = [tokens(n, seed=n) for n in (131, 17, 80, 63, 1)]
    continuation = torch.stack([tokens(18, seed=200 + index) for index in range(len(rows))])
    with deltakv.apply(model, method) as handle:
        together, _ = decode(model, left_padded(rows), continuation)
        counted = counts(handle)
        handle.stats.reset()
        for index, row in enumerate(rows):
            alone, _ = decode(model, left_padded([row]), continuation[index : index + 1])
            assert_close(together[index], alone[0])
        assert counts(handle) == counted
        assert handle.stats.sparse_rows == 18 + 0 + 18 - 10  # the third has 91 tokens at its eleventh step
        generated = greedy(model, left_padded(rows), 18)
        for index, row in enumerate(rows):
            assert_close(generated.logits[:, index], greedy(model, left_padded([row]), 18).logits[:, 0])


def test_evaluation_of_a_ragged_batch_in_chunks(model_of: Any) -> None:
    model, rows = model_of("llama"), [tokens(n, seed=n) for n in (90, 30)]
    new = torch.stack([tokens(70, seed=100 + index) for index in range(2)])
    with deltakv.apply(model, METHOD) as handle, torch.no_grad():
        batch = left_padded(rows)
        decoded, _ = decode(model, batch, new)
        counted = counts(handle)
        handle.stats.reset()
        _, cache = decode(model, batch, new[:, :0])
        with handle.positions():
            parts, mask = [], batch["attention_mask"]
            for chunk in new.split([41, 1, 28], dim=1):
                mask = torch.cat([mask, torch.ones_like(chunk)], dim=1)
                at = (mask.cumsum(-1) - 1)[:, -chunk.shape[1] :]
                out = model(chunk, attention_mask=mask, position_ids=at, past_key_values=cache)
                parts.append(out.logits)
        assert_close(torch.cat(parts, dim=1), decoded[:, 1:])
        assert counts(handle) == counted


def test_a_compiled_step_is_one_graph(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at a value, so that a GPU can capture it; rows that cross `min_context`, and that end."""
    monkeypatch.undo()  # poisoned memory is Python that dynamo would trace into
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    model, batch = model_of("llama"), left_padded([tokens(n, seed=n) for n in (3, 95, 200)])
    with deltakv.apply(model, deltakv.Delta(**SMALL | {"min_context": 100}, plan="WSRWRF")) as handle:
        end, _ = an_end(model, batch)
        handle.stats.reset()
        plain, want = greedy(model, batch, 20, eos_token_id=end), counts(handle)
        handle.stats.reset()
        compiled = greedy(model, batch, 20, eos_token_id=end, compile_config=config)
        assert counts(handle) == want and want[1] > 0
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    assert torch.equal(compiled.logits, plain.logits)


@pytest.mark.parametrize(("room", "made"), [(128, 0), (129, 1)])
def test_where_all_pages_are_kept_it_is_full_attention(
    model_of: Any, monkeypatch: pytest.MonkeyPatch, room: int, made: int
) -> None:
    """Bit for bit, whether a shape says that no row can lose a page or the rows' lengths do. The pages are told once a
    step, for all WINDOW layers."""
    from deltakv.integrations.hf import selecting

    told: list[Any] = []
    window_of = selecting.window_of
    monkeypatch.setattr(selecting, "window_of", lambda *args: told.append(args) or window_of(*args))
    row, model = tokens(128)[None], model_of("llama")
    logits = []
    for method in (deltakv.Delta(**SMALL | {"min_context": 128}, plan="WFWWFW"), deltakv.Full()):
        with torch.no_grad(), deltakv.apply(model, method) as handle:
            cache = handle.new_cache(room)
            model(row[:, :110], past_key_values=cache)
            steps = [model(row[:, i : i + 1], past_key_values=cache).logits for i in range(110, 128)]
            assert handle.stats.attended_tokens == handle.stats.full_tokens > handle.stats.sparse_rows == 0
            logits.append(torch.cat(steps))
    assert torch.equal(*logits)
    assert len(told) == made * 18


def test_a_window_is_streaming_llm_s(model_of: Any) -> None:
    """WINDOW in every layer, and StreamingLLM's own pick of the same tokens: the same answers."""
    model, row = model_of("qwen2"), tokens(150, seed=4)
    logits, attended = [], []
    for method in (
        deltakv.Delta(budget=96, recent=16, sinks=32, min_context=0, plan="WWWWWW"),
        deltakv.StreamingLLM(window=64, sinks=32),
    ):
        with deltakv.apply(model, method) as handle:
            logits.append(decode(model, left_padded([row[:120]]), row[None, 120:])[0])
            attended.append(handle.stats.attended_tokens)
    assert torch.equal(*logits)
    assert attended[0] == attended[1]


def test_windows_are_not_picks(model_of: Any) -> None:
    """A WINDOW layer between two Δ-layers ends no pick's reuse, and what it reads is not recorded as one."""
    model, row = model_of("llama"), tokens(130, seed=5)
    with deltakv.apply(model, METHOD) as handle:
        handle.stats.record_picks = True
        decode(model, left_padded([row[:120]]), row[None, 120:])
        assert {layer for _, layer, *_ in handle.stats.picks} == {1}
    assert METHOD.layer_plan(6).reads_in_full == 2
