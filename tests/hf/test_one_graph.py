"""Decode steps that keep their books on the device, compiled in one piece."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import deltakv
from hf.harness import SMALL, assert_close, assert_same_generation, decode, greedy, ragged, tokens
from hf.on_device import COVERING, KINDS, SPARSE, an_end, counted, lengths

Graphs = Callable[[], int]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """How many graphs the compiler has made; it starts and ends empty."""
    monkeypatch.undo()  # poisoned memory is Python that dynamo would trace into
    loggers = {name: logging.getLogger(name) for name in ("torch._dynamo", "torch.fx")}
    for logger in loggers.values():  # pytest listens to all of them
        monkeypatch.setattr(logger, "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def in_one_piece() -> CompileConfig:
    """Has `generate` compile its steps on the CPU, too; a step that cannot be one graph is an error."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_two_generates(model_of: Any, graphs: Graphs, kind: str) -> None:
    """Other prompts, other lengths, another end: the same graph, and what runs without a compiler."""
    model, calls = model_of(kind), [(ragged(70, 33, 101), 24), (ragged(60, 66, 20, seed=1), 30)]

    def run(**options: Any) -> tuple[list[Any], tuple[int, ...]]:
        with deltakv.apply(model, SPARSE) as handle:
            return [greedy(model, batch, count, **options) for batch, count in calls], counted(handle)

    plain, want = run()
    compiled, got = run(compile_config=in_one_piece())
    assert graphs() == 1
    assert got == want and got[2] > 0
    for one, other in zip(compiled, plain, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.sequences, other.sequences)


def test_rows_that_end_cross_min_context_or_differ_much(model_of: Any, graphs: Graphs) -> None:
    model, batch = model_of("llama"), ragged(3, 95, 200)
    method = deltakv.Delta(**SMALL | {"min_context": 100}, plan="FSRRSR")
    with deltakv.apply(model, method) as handle:
        end, made = an_end(model, batch)
        fed = [min(count, 19) for count in made]
        handle.stats.reset()
        plain, want = greedy(model, batch, 20, eos_token_id=end), counted(handle)
        # Row 1 becomes sparse with its 101st token, in step 6.
        assert want[:3] == (19, sum(fed), fed[1] - 5 + fed[2])
        handle.stats.reset()
        compiled = greedy(model, batch, 20, eos_token_id=end, compile_config=in_one_piece())
        assert counted(handle) == want
        assert (
            lengths(compiled.past_key_values)
            == lengths(plain.past_key_values)
            == [3 + fed[0], 95 + fed[1], 200 + fed[2]]
        )
    assert graphs() == 1
    assert torch.equal(compiled.logits, plain.logits)


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt"])
def test_plain_loop(tiny_model: Any, graphs: Graphs, kind: str) -> None:
    """Announced by hand, for a batch with padding: positions are those of each row's tokens."""
    model, batch, new = tiny_model(kind), ragged(40, 65, 12), tokens(36).view(3, 12)  # compiling leaves a mark
    with deltakv.apply(model, SPARSE) as handle, torch.no_grad():
        want, _ = decode(model, batch, new, handle.new_cache())
        stats = counted(handle)
        handle.stats.reset()
        cache, compiled = handle.new_cache(200), torch.compile(model, fullgraph=True, backend="eager")
        logits = decode(model, batch, new[:, :0], cache)[0]
        for token in new.T[..., None]:
            assert handle.announce(cache)
            logits = torch.cat([logits, compiled(token, past_key_values=cache).logits], dim=1)
        assert counted(handle) == stats
    assert graphs() == 1
    assert_close(logits, want)


def test_turns_on_a_static_cache(model_of: Any, graphs: Graphs) -> None:
    """Three turns, the last beyond `max_length`: it may be compiled again, and stays right."""
    model, batch = model_of("llama"), ragged(30, 18)

    def turns(cache: Any, **options: Any) -> Iterator[Any]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        for count in (12, 20, 60):
            out = greedy(model, {"input_ids": ids, "attention_mask": mask}, count, past_key_values=cache, **options)
            ids = torch.cat([out.sequences, tokens(6, seed=count).view(2, 3)], dim=1)
            mask = torch.cat([mask, torch.ones(2, count + 3, dtype=torch.long)], dim=1)
            cache = out.past_key_values
            yield out

    stock = list(turns(None))
    with deltakv.apply(model, COVERING) as handle:
        cache = handle.new_cache(80, static=True)
        ours, books = turns(cache, compile_config=in_one_piece()), cache.state.decoding
        places = []
        for number, theirs in enumerate(stock):
            assert_same_generation(next(ours), theirs)
            assert graphs() == 1 or number == 2
            tensors = (books.lengths, books.columns, books.block_table, books.finished, books.meter.counts)
            places.append([tensor.data_ptr() for tensor in (*tensors, cache.state.kv.pool.k[0])])
        assert places[0] == places[1], "a graph that was captured would read the tensors of the turn before"


def test_sampling_with_rows_that_end(model_of: Any, graphs: Graphs) -> None:
    """What a finished row says is never NaN: sampling would fail."""
    model, batch = model_of("llama"), ragged(40, 90)

    def sample(**options: Any) -> Any:
        torch.manual_seed(5)
        return model.generate(
            **batch,
            max_new_tokens=20,
            do_sample=True,
            num_return_sequences=3,
            eos_token_id=list(range(3, 13)),
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )

    with deltakv.apply(model, SPARSE):
        plain, compiled = sample(), sample(compile_config=in_one_piece())
        assert len(set(lengths(plain.past_key_values))) > 2
    assert graphs() == 1
    assert torch.equal(compiled.sequences, plain.sequences)
    assert all(logits.isfinite().all() for logits in compiled.logits)


def test_what_the_host_lays_out_is_not_compiled(model_of: Any, graphs: Graphs) -> None:
    """A prompt in chunks, and recorded picks."""
    model, batch = model_of("llama"), ragged(65, 40)
    with deltakv.apply(model, SPARSE) as handle:
        want = greedy(model, batch, 8)
        chunked = greedy(model, batch, 8, prefill_chunk_size=25, compile_config=in_one_piece())
        assert graphs() == 1
        handle.stats.record_picks = True
        recorded = greedy(model, batch, 8, compile_config=in_one_piece())
        assert len(handle.stats.picks) == 7 * 2
    assert graphs() == 1
    assert torch.equal(recorded.logits, want.logits)
    assert_same_generation(chunked, want)


def test_nothing_is_kept_alive(model_of: Any, graphs: Graphs) -> None:
    model, batch = model_of("llama"), ragged(30, 18)
    with deltakv.apply(model, SPARSE) as handle:
        for options in ({}, {"compile_config": in_one_piece()}):
            out = greedy(model, batch, 5, **options)
            cache = out.past_key_values
            memory = [weakref.ref(x) for x in (cache, cache.kv, *cache.kv.pool.k, cache.state.decoding.block_table)]
            del out, cache
            gc.collect()
            assert [ref() for ref in memory] == [None] * len(memory)
            assert handle.cache is None and handle.stats.kv_bytes > 0
    assert graphs() == 1
