"""The matrix that every method passes: whole models against `tests/oracle_methods.py`, and a row against its
neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig

import deltakv
from deltakv.methods import parse
from hf.harness import (
    assert_close,
    decode,
    failing_layer,
    greedy,
    left_padded,
    positions,
    ragged,
    recorded_picks,
    tokens,
)
from oracle import picks_agree
from oracle_methods import DenseMethod

#: Each method small enough to be sparse in tests, as a command line writes it and as the oracle takes it.
SMALL: dict[str, dict[str, Any]] = {
    "streaming": {"window": 48, "sinks": 16},
    "quest": {"budget": 64, "recent": 16, "sinks": 0},
    "tidal": {"budget": 64, "recent": 16, "sinks": 16},
    "lessismore": {"budget": 80, "recency": 0.4, "sinks": 16},
    "tactic": {"budget": 96, "recent": 16, "sinks": 16, "mass": 0.6},
    "tokenselect": {"budget": 64, "recent": 16, "sinks": 16, "similarity": 0.35},
    "refreshkv": {"budget": 64, "recent": 16, "sinks": 16, "stride": 3, "similarity": 0.5},
    "indexcache": {"budget": 64, "recent": 32, "sinks": 16},
    "h2o": {"budget": 64, "recent": 32, "sinks": 0, "lag": 5},
    "a2sf": {"budget": 64, "recent": 16, "sinks": 16, "lag": 3, "forgetting": 0.7},
    "lazyeviction": {"budget": 64, "recent": 16, "sinks": 0, "lag": 7, "alpha": 0.15},
}
METHODS = sorted(SMALL)
EVICTING = ("a2sf", "h2o", "lazyeviction")

#: What makes each method keep everything.
COVERING: dict[str, dict[str, Any]] = {
    "streaming": {"window": 512},
    "tactic": {"budget": 512, "mass": 1.0},
    "lessismore": {"budget": 512},
}

#: Every architecture, or one for each way in which they differ to attention.
KINDS = ("llama", "qwen3", "opt", "gemma3", "gpt_oss")

#: Plans by method and depth: layers that join the plan are 6, or 4 where some have a window.
PLANS = {6: "FSRRSR", 4: "SRSR"}
OWN = {
    "quest": {6: "FFSSSS", 4: "FSSS"},
    "tokenselect": {6: "SSSSSS", 4: "SSSS"},
    "refreshkv": {6: "FSSSRS", 4: "SSRS"},
}
OWN |= {name: {6: "FSSSFS", 4: "SSFS"} for name in EVICTING}
DEPTH = dict.fromkeys(KINDS, 6) | {"gpt_oss": 4}


def small(name: str, kind: str, **changes: Any) -> Any:
    plan = OWN.get(name, PLANS)[DEPTH.get(kind, 6)]
    options = {**SMALL[name], "plan": plan, **changes}
    return parse(f"{name}:" + ",".join(f"{option}={value}" for option, value in options.items()))


def oracle(model: Any, name: str, method: Any) -> DenseMethod:
    options = {option: getattr(method, option) for option in SMALL[name] if option not in ("window", "recency")}
    options |= {"recent": method.recent_pages * method.page_size}
    options.setdefault("budget", 0)
    letters = str(method.layer_plan(len(method.plan)))
    return DenseMethod(model, letters, name, method.page_size, **options)


def assert_is_the_oracle_s(
    model: Any, name: str, method: Any, row: Tensor, start: int, logits: Tensor, picks: dict[int, Any]
) -> tuple[Any, DenseMethod]:
    """Picks equal up to rounding, logits given the same pick."""
    dense = oracle(model, name, method)
    run = dense(row, start, picks)
    assert sorted(picks) == sorted(run.picks)
    for layer, chosen in picks.items():
        for step, (got, want) in enumerate(zip(chosen, run.picks[layer], strict=True)):
            assert picks_agree(got, want, run.scores[layer][step], 1e-4), (
                f"layer {layer}, position {start + step}: picked {got}, the oracle {want}"
            )
    assert_close(logits, run.logits[start:])
    return run, dense


def counts(handle: Any) -> tuple[int, ...]:
    stats = handle.stats
    return stats.rows, stats.sparse_rows, stats.attended_tokens, stats.full_tokens


@torch.no_grad()
def evaluate(model: Any, handle: Any, row: Tensor, start: int, chunks: list[int], **want: bool) -> tuple[Tensor, Any]:
    cache = model(row[None, :start]).past_key_values
    handle.stats.reset()
    with handle.positions(**want) as trace:
        parts = [model(part[None], past_key_values=cache).logits[0] for part in row[start:].split(chunks)]
    return torch.cat(parts), trace


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_decoding_is_the_oracle_s(model_of: Any, name: str, kind: str) -> None:
    """One token at a time from below the budget over four page edges; and the same on the device's books, and in
    evaluation mode."""
    model, method, row = model_of(kind), small(name, kind), tokens(118, seed=1)
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        logits, _ = decode(model, left_padded([row[:58]]), row[None, 58:])
        recorded, counted = recorded_picks(handle), counts(handle)
        run, dense = assert_is_the_oracle_s(model, name, method, row, 58, logits[0, 1:], recorded)
        assert counted[2:] == (run.attended, run.full)
        assert counted[1] > 30

        handle.stats.record_picks = False
        handle.stats.reset()
        with torch.no_grad():
            cache = model(row[None, :58]).past_key_values
            steps = [model(token.view(1, 1), past_key_values=cache).logits[0] for token in row[58:]]
            assert cache.decoding or any(cache.windows) or method.evicts
        assert_close(torch.cat(steps), logits[0, 1:])
        assert counts(handle) == counted

        evaluated, trace = evaluate(model, handle, row, 58, [60], picks=True, recall=True)
        assert_close(evaluated, logits[0, 1:])
        assert {layer: [p.tolist() for p in chosen] for layer, chosen in trace.picks.items()} == recorded
        assert counts(handle) == counted
        assert trace.recall == pytest.approx(run.recall, abs=1e-4)
    if (
        method.remembers and not method.evicts
    ):  # neither always nor never: otherwise these tests would not see what is remembered
        assert len(dense.due) < sum(map(sum, dense.due.values())) < 60 * len(dense.due)


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_that_covers_the_context_is_stock(model_of: Any, name: str) -> None:
    model = model_of("llama")
    changes = COVERING.get(name, {"budget": 512})
    stock = greedy(model, ragged(130, 40), 20)
    with deltakv.apply(model, small(name, "llama", **changes)) as handle:
        ours = greedy(model, ragged(130, 40), 20)
    assert_close(ours.logits, stock.logits)
    assert handle.stats.sparse_rows == 0 or name == "tactic"


@pytest.mark.parametrize("name", METHODS)
def test_sparse_is_not_dense(model_of: Any, name: str) -> None:
    row = tokens(140, seed=2)
    model = model_of("llama")
    with deltakv.apply(model, deltakv.Full()):
        full, _ = decode(model, left_padded([row[:132]]), row[None, 132:])
    with deltakv.apply(model, small(name, "llama")):
        sparse, _ = decode(model, left_padded([row[:132]]), row[None, 132:])
    assert (full - sparse)[:, 1:].abs().max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", METHODS)
def test_ragged_batch_equals_its_rows_alone(model_of: Any, name: str, kind: str) -> None:
    model, method = model_of(kind), small(name, kind)
    rows = [tokens(n, seed=n) for n in (131, 17, 80, 1)]
    continuation = torch.stack([tokens(18, seed=200 + index) for index in range(len(rows))])
    with deltakv.apply(model, method) as handle:
        handle.stats.record_picks = True
        together, _ = decode(model, left_padded(rows), continuation)
        picks, counted = [recorded_picks(handle, row) for row in range(len(rows))], counts(handle)
        handle.stats.reset()
        for index, row in enumerate(rows):
            handle.stats.picks.clear()
            alone, _ = decode(model, left_padded([row]), continuation[index : index + 1])
            assert_close(together[index], alone[0])
            assert picks[index] == recorded_picks(handle)
        assert counts(handle) == counted


@pytest.mark.parametrize("name", METHODS)
def test_ragged_generation_equals_its_rows_alone(model_of: Any, name: str) -> None:
    """Steps whose books are on the device."""
    model, rows = model_of("llama"), [tokens(n, seed=n) for n in (100, 20, 70)]
    with deltakv.apply(model, small(name, "llama")):
        together = greedy(model, left_padded(rows), 20)
        for index, row in enumerate(rows):
            alone = greedy(model, left_padded([row]), 20)
            assert_close(together.logits[:, index], alone.logits[:, 0])


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_step_is_one_graph(model_of: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at a value, so that a GPU can capture it; and what is known moves on in place."""
    monkeypatch.undo()  # poisoned memory is Python that dynamo would trace into
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    model, batch = model_of("llama"), ragged(90, 60)
    with deltakv.apply(model, deltakv.Full()) as handle:
        cache = handle.new_cache(200, static=True)
    with deltakv.apply(model, small(name, "llama")) as handle:
        plain = greedy(model, batch, 40)
        counted = counts(handle)
        handle.stats.reset()
        compiled = greedy(model, batch, 40, compile_config=config, past_key_values=cache)
        assert counts(handle) == counted
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    assert_close(compiled.logits, plain.logits)


@pytest.mark.parametrize("name", METHODS)
def test_beams(model_of: Any, name: str) -> None:
    """Each beam that survives has seen exactly its own history: decoded alone it has the score that the search gave."""
    model, row, count = model_of("llama"), tokens(85, seed=1), 30
    with deltakv.apply(model, small(name, "llama")), torch.no_grad():
        out = model.generate(
            row[None],
            max_new_tokens=count,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert (out.beam_indices[:, 1:] != out.beam_indices[:, :-1]).any()
        for index in range(3):
            beam = out.sequences[index, 85:]
            logits, _ = decode(model, left_padded([row]), beam[None, :-1])
            taken = logits[0].log_softmax(-1).gather(1, beam[:, None])
            torch.testing.assert_close(taken.sum(), out.sequences_scores[index], atol=1e-3, rtol=0)


@pytest.mark.parametrize("masked", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("name", METHODS)
def test_crop_and_reset_begin_anew(model_of: Any, name: str, masked: bool) -> None:
    """After dropping tokens, decoding goes on as from a prompt; other tokens then lie on the pages of the dropped
    ones."""
    model, row, other = model_of("llama"), tokens(128, seed=5), tokens(128, seed=6)
    with deltakv.apply(model, small(name, "llama")) as handle, torch.no_grad():
        handle.stats.record_picks = masked

        def prefilled(ids: Tensor) -> Any:
            return model(ids[None], past_key_values=deltakv.PagedCache([None] * 6, 16)).past_key_values

        cache = prefilled(row[:100])

        def steps(ids: Tensor, cache: Any) -> Tensor:
            return torch.cat([model(t.view(1, 1), past_key_values=cache).logits[0] for t in ids])

        steps(row[100:], cache)
        cache.crop(-28)
        again = steps(other[:28], cache)
        fresh = steps(other[:28], prefilled(row[:100]))
        assert_close(again, fresh)
        cache.reset()
        model(other[None, :90], past_key_values=cache)
        assert_close(steps(other[90:], cache), steps(other[90:], prefilled(other[:90])))


@pytest.mark.parametrize("name", METHODS)
def test_second_turn_begins_anew(model_of: Any, name: str) -> None:
    model, row = model_of("llama"), tokens(170, seed=8)
    with deltakv.apply(model, small(name, "llama")) as handle, torch.no_grad():
        cache = deltakv.PagedCache([None] * 6, 16)
        decode(model, left_padded([row[:70]]), row[None, 70:90], cache)
        model(row[None, 90:127], past_key_values=cache)
        last = torch.cat([model(t.view(1, 1), past_key_values=cache).logits[0] for t in row[127:]])
        # Pages and queries of the first turn's steps must not show: K and V do, so they are kept.
        cache.crop(-43)
        handle.stats.record_picks = True
        again = torch.cat([model(t.view(1, 1), past_key_values=cache).logits[0] for t in row[127:]])
    assert_close(again, last)


@pytest.mark.parametrize("chunks", [[20, 36], [55, 1], [1, 54, 1]], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_evaluation_in_chunks(model_of: Any, name: str, chunks: list[int]) -> None:
    """Chunks continue each other, also in what is remembered."""
    model, method, row = model_of("llama"), small(name, "llama"), tokens(131, seed=2)
    with deltakv.apply(model, method) as handle:
        whole, once = evaluate(model, handle, row, 75, [56], picks=True)
        counted = counts(handle)
        parts, trace = evaluate(model, handle, row, 75, chunks, picks=True)
        assert counts(handle) == counted
    assert_close(parts, whole)
    assert {k: [p.tolist() for p in v] for k, v in trace.picks.items()} == {
        k: [p.tolist() for p in v] for k, v in once.picks.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_of_a_ragged_batch_and_many_positions(model_of: Any, name: str) -> None:
    model, method = model_of("llama"), small(name, "llama")
    rows = [tokens(n, seed=n) for n in (90, 30)]
    new = torch.stack([tokens(70, seed=100 + index) for index in range(2)])
    batch = left_padded(rows)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 70, dtype=torch.long)], dim=1)
    with deltakv.apply(model, method) as handle, torch.no_grad():
        cache = model(**batch, position_ids=positions(batch["attention_mask"])).past_key_values
        with handle.positions():
            together = model(
                new, attention_mask=mask, position_ids=positions(mask)[:, -70:], past_key_values=cache
            ).logits
        decoded, _ = decode(model, batch, new)
    assert_close(together, decoded[:, 1:])


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_turns_on_one_cache(model_of: Any, name: str) -> None:
    """What `compare` does: one prefill for all; each leaves the cache as it was, and knows nothing of the others."""
    model, row = model_of("llama"), tokens(130, seed=4)
    methods = [small(name, "llama"), deltakv.Full(), small(name, "llama")]
    with deltakv.apply(model, methods[0]) as handle:
        expected = evaluate(model, handle, row, 100, [30])[0]
    with deltakv.apply(model, deltakv.Full()) as handle, torch.no_grad():
        cache = handle.new_cache(croppable=True)
        model(row[None, :100], past_key_values=cache)
    for method in methods:
        with deltakv.apply(model, method) as handle, torch.no_grad():
            steps = torch.cat([model(t.view(1, 1), past_key_values=cache).logits[0] for t in row[100:]])
            cache.crop(-30)
            with handle.positions():
                ours = model(row[None, 100:], past_key_values=cache).logits[0]
            cache.crop(-30)
            assert_close(steps, ours)
        if method != deltakv.Full():
            assert_close(ours, expected)


@pytest.mark.parametrize("between", ["full", "tokenselect", "quest"])
@pytest.mark.parametrize("name", METHODS)
def test_another_method_in_between(model_of: Any, name: str, between: str) -> None:
    """What one method knows ends with another's first step on the cache, also where the host looks at nothing."""
    model, row = model_of("llama"), tokens(160, seed=11)
    other = deltakv.Full() if between == "full" else small(between, "llama")

    def steps(method: Any, ids: Tensor) -> Tensor:
        with deltakv.apply(model, method), torch.no_grad():
            return torch.cat([model(t.view(1, 1), past_key_values=cache).logits[0] for t in ids])

    with deltakv.apply(model, deltakv.Full()), torch.no_grad():
        cache = model(row[None, :80], past_key_values=deltakv.PagedCache([None] * 6, 16)).past_key_values
    steps(small(name, "llama"), row[80:93])
    steps(other, row[93:130])
    ours = steps(small(name, "llama"), row[130:])
    cache.crop(-30)
    assert_close(steps(small(name, "llama"), row[130:]), ours)


@pytest.mark.parametrize("name", METHODS)
def test_a_forward_that_fails_is_forgotten(model_of: Any, name: str) -> None:
    model, row = model_of("llama"), tokens(130, seed=9)
    with deltakv.apply(model, small(name, "llama")), torch.no_grad():
        logits = []
        for fails in (False, True):
            cache = model(row[None, :100]).past_key_values
            for index, token in enumerate(row[100:]):
                if fails and index % 7 == 3:
                    with failing_layer(model, 5), pytest.raises(RuntimeError, match="in the middle"):
                        model(tokens(1, seed=index).view(1, 1), past_key_values=cache)
                logits.append(model(token.view(1, 1), past_key_values=cache).logits[0])
    assert_close(torch.cat(logits[30:]), torch.cat(logits[:30]))
