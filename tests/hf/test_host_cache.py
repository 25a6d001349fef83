"""K and V in host memory, part of them recomputed: the same logits as on the device, whatever crosses how and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltakv
from deltakv.integrations.hf import offload as setup
from deltakv.offload import attention, memory
from deltakv.offload.lanes import lanes_of
from deltakv.offload.planner import FixedShare
from deltakv.offload.profile import Timing
from deltakv.offload.scheduler import Schedule
from hf.harness import (
    assert_close,
    assert_same_generation,
    decode,
    failing_layer,
    greedy,
    left_padded,
    positions,
    ragged,
    tokens,
)
from hf.test_turns import next_turn
from offload.delays import late_lanes, late_store
from offload.made_up import SHAPE, profile

#: What KVPR is for, and biases, K-norm and a joint projection with fewer KV heads, where recomputing must be forced.
RECOMPUTED = ("opt", "llama_mha", "qwen2", "qwen3", "phi3")
#: Windows and learned sinks: K and V alone cross.
MOVED = ("gemma3", "gpt_oss", "mistral")
#: Chunks of a few tokens, so that a row has many.
SMALL: dict[str, Any] = {"chunk_mib": 6 / 1024, "chunks": 3}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of a few tokens, and queries in small blocks, so that every edge is met."""
    monkeypatch.setattr(memory, "SLAB_BYTES", 1 << 14)
    monkeypatch.setattr(memory, "LEAST_SLAB_BYTES", 1 << 10)
    monkeypatch.setattr(attention, "_LOGITS", 512)


@pytest.fixture(params=[lanes_of, late_lanes, late_store], ids=["at once", "late", "late store"])
def timing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies as early as they can be, and as late as they may, all or those to the host: a missing wait shows in one of
    them."""
    rows = setup.HostRows
    monkeypatch.setattr(setup, "HostRows", lambda *args: rows(*args, make_lanes=request.param))


def host(**options: Any) -> deltakv.Host:
    return deltakv.Host(**{**SMALL, **options})


def on_host(model: Any, **options: Any) -> Any:
    return deltakv.apply(model, deltakv.Full(), kv_device=host(**options))


def recomputed(handle: Any) -> int:
    """Tokens that the first layer has recomputed in the last step."""
    pieces = handle.cache.host_rows._pieces[handle.planned_layers[0]]
    return sum(piece.tokens for piece in pieces if piece.kind.value == "X")


@pytest.mark.parametrize("kind", RECOMPUTED)
@pytest.mark.parametrize(
    ("share", "schedule"), [(0.0, "pipelined"), (0.6, "pipelined"), (0.6, "serial"), (1.0, "serial")]
)
def test_generation_of_a_ragged_batch(model_of: Any, timing: None, kind: str, schedule: str, share: float) -> None:
    model, batch = model_of(kind), ragged(45, 18, 33)
    stock = greedy(model, batch, 12)
    with on_host(model, recompute=share, schedule=schedule) as handle:
        ours = greedy(model, batch, 12)
        assert_same_generation(ours, stock)
        assert recomputed(handle) == int(share * 55)
        assert len(handle.cache.host_rows._pieces[0]) > 5, "a row must have many pieces"


@pytest.mark.parametrize("kind", MOVED)
def test_generation_of_models_that_move_all(model_of: Any, timing: None, kind: str) -> None:
    model, batch = model_of(kind), ragged(45, 18, 33)
    stock = greedy(model, batch, 12)
    with on_host(model) as handle:
        assert_same_generation(greedy(model, batch, 12), stock)
        assert handle.offload.reason


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_one_long_row(model_of: Any, timing: None, kind: str) -> None:
    """Rows of one length, so that every store is one piece; through many chunks and slabs."""
    model, batch = model_of(kind), {"input_ids": tokens(200).view(2, 100)}
    stock = greedy(model, batch, 20)
    with on_host(model, recompute=0.7):
        assert_same_generation(greedy(model, batch, 20), stock)


@pytest.mark.parametrize("kind", ["opt", "llama_mha", "qwen2", "qwen3"])
def test_three_turns_of_a_batch_that_ends_raggedly(model_of: Any, timing: None, kind: str) -> None:
    model, prompt = model_of(kind), ragged(40, 17, 33)
    end = int(greedy(model, prompt, 14).sequences[1, 40 + 4])

    def talk() -> list[Any]:
        mask, turns = prompt["attention_mask"], [greedy(model, prompt, 14, eos_token_id=end)]
        for turn in range(2):
            new = torch.stack([tokens(8, seed=20 + 3 * turn + row) for row in range(3)])
            batch = next_turn(turns[-1].sequences, mask, end, new)
            mask = batch["attention_mask"]
            turns.append(greedy(model, batch, 10, eos_token_id=end, past_key_values=turns[-1].past_key_values))
        return turns

    stock = talk()
    with on_host(model, recompute=0.5):
        for ours, theirs in zip(talk(), stock, strict=True):
            assert_same_generation(ours, theirs)


@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_a_prompt_in_chunks(model_of: Any, timing: None, kind: str) -> None:
    """Forwards of several tokens onto a past, by plain calls that say nothing of the length to come."""
    model, row = model_of(kind), tokens(150)[None]
    with torch.no_grad():
        expected = model(row).logits
        with on_host(model, recompute=0.5) as handle:
            cache, logits = handle.new_cache(), []
            for chunk in row.split(37, dim=1):
                logits.append(model(chunk, past_key_values=cache).logits)
            assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("kind", ["opt", "llama_mha"])
def test_plain_calls_of_a_ragged_batch(model_of: Any, timing: None, kind: str) -> None:
    model, batch = model_of(kind), ragged(30, 12)
    continuation = tokens(20).view(2, 10)
    stock, _ = decode(model, batch, continuation)
    with on_host(model, recompute=0.4):
        ours, _ = decode(model, batch, continuation)
    assert_close(ours, stock)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_several_tokens_right_behind_a_ragged_prompt(model_of: Any, timing: None, kind: str, share: float) -> None:
    """The host puts these in their places itself, where what is still on its way must not come after them."""
    model, prompt, new = model_of(kind), ragged(30, 12, 21), tokens(24, seed=5).view(3, 8)
    mask = torch.cat([prompt["attention_mask"], torch.ones(3, 8, dtype=torch.long)], dim=1)
    where = positions(mask)

    def talk() -> Any:
        cache = model(**prompt, position_ids=where[:, :30], use_cache=True).past_key_values
        logits = [model(new, attention_mask=mask, position_ids=where[:, 30:], past_key_values=cache).logits]
        more = torch.cat([mask, mask[:, -1:]], dim=1)
        last = positions(more)[:, -1:]
        logits.append(model(new[:, :1], attention_mask=more, position_ids=last, past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        stock = talk()
        with on_host(model, recompute=share):
            assert_close(talk(), stock)


def test_going_back(model_of: Any, timing: None) -> None:
    model, row = model_of("llama_mha"), tokens(60)[None]
    with on_host(model, recompute=0.5), torch.no_grad():
        cache = model(row[:, :50]).past_key_values
        for token in tokens(8, seed=1):
            model(token[None, None], past_key_values=cache)
        cache.crop(-20)
        assert cache.get_seq_length() == 38
        ours = model(row[:, 38:], past_key_values=cache).logits
    with torch.no_grad():
        assert_close(ours, model(row).logits[:, 38:])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "num_beams": 3}], ids=str)
def test_beams(model_of: Any, timing: None, options: dict[str, int]) -> None:
    model, batch = model_of("opt"), ragged(30, 14)
    stock = model.generate(**batch, max_new_tokens=12, do_sample=False, **options)
    with on_host(model, recompute=0.5):
        assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False, **options), stock)


def test_rows_that_are_chosen(model_of: Any, timing: None) -> None:
    model, batch = model_of("llama_mha"), ragged(30, 14, 22)
    with torch.no_grad():
        alone, _ = decode(model, left_padded([batch["input_ids"][2, -22:]]), tokens(4)[None])
        with on_host(model, recompute=0.5):
            _, cache = decode(model, batch, torch.zeros(3, 0, dtype=torch.long))
            cache.batch_select_indices(torch.tensor([2]))
            mask = torch.cat([batch["attention_mask"][2:], torch.ones(1, 4, dtype=torch.long)], dim=1)
            for step in range(4):
                seen = mask[:, : 31 + step]
                logits = model(
                    tokens(4)[None, step : step + 1], attention_mask=seen, past_key_values=cache,
                    position_ids=torch.tensor([[22 + step]]),
                ).logits  # fmt: skip
                assert_close(logits[:, -1], alone[:, step + 1])


@pytest.mark.parametrize("known", [True, False], ids=["length known", "length unknown"])
def test_x_is_kept_of_what_will_be_recomputed(model_of: Any, known: bool) -> None:
    """No more than that of a row whose length `generate` announces; of all where nobody says how long it will be."""
    model = model_of("opt")
    with on_host(model, recompute=0.5) as handle, torch.no_grad():
        cache = handle.new_cache(max_length=60 if known else None)
        model(tokens(40)[None], past_key_values=cache)
        layer = cache.host_rows._layers[0]
        assert layer.x_limit == 30 if known else layer.x_limit > 1 << 30
        kept = 30 if known else 40
        assert cache.kv_bytes == 6 * (40 * layer.kv.record + kept * layer.x.record)
        for token in tokens(40, seed=1):  # longer than was said: K and V cross where X is not
            logits = model(token[None, None], past_key_values=cache).logits
        assert recomputed(handle) == min(39, 30 if known else 39)
    row = torch.cat([tokens(40), tokens(40, seed=1)])[None]
    with torch.no_grad():
        assert_close(logits[:, -1], model(row).logits[:, -1])


def test_a_later_turn_announces_a_longer_row(model_of: Any) -> None:
    """X is missing where the first turn did not keep it, and stays so."""
    model = model_of("llama_mha")

    def talk() -> list[Any]:
        first = greedy(model, ragged(45), 12)
        ids = torch.cat([first.sequences, tokens(30, seed=9)[None]], dim=1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return [first, greedy(model, batch, 40, past_key_values=first.past_key_values)]

    stock = talk()
    with on_host(model, recompute=0.5):
        for ours, theirs in zip(talk(), stock, strict=True):
            assert_same_generation(ours, theirs)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.15), (4, 3.0)])
def test_quantised_rows_are_near(model_of: Any, timing: None, bits: int, tolerance: float) -> None:
    """Near, and not the same: the codes are read. Error bounds: tests/offload/test_codecs.py."""
    model, batch = model_of("qwen2"), ragged(60, 30)
    continuation = tokens(20).view(2, 10)
    stock, _ = decode(model, batch, continuation)
    plain = host(recompute=0)
    with on_host(model, bits=bits) as handle:
        ours, cache = decode(model, batch, continuation)
        assert "grouped-query" in handle.offload.reason
    error = (ours - stock)[:, 1:].abs().max()
    assert 1e-5 < error < tolerance
    with deltakv.apply(model, deltakv.Full(), kv_device=plain):
        _, exact = decode(model, batch, continuation)
    assert exact.kv_bytes > 2.5 * cache.kv_bytes


def test_device_memory_does_not_grow(model_of: Any) -> None:
    model = model_of("opt")
    sizes = []
    with on_host(model, recompute=0.5) as handle, torch.no_grad():
        for length in (20, 200, 1000):
            cache = model(tokens(length)[None]).past_key_values
            model(tokens(1)[None], past_key_values=cache)
            sizes.append(handle.cache.host_rows.device_bytes)
            assert handle.cache.host_rows.host_bytes >= cache.kv_bytes
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_a_cache_that_is_forgotten_gives_its_memory_back(model_of: Any) -> None:
    model = model_of("opt")
    with on_host(model, recompute=0.5), torch.no_grad():
        cache = model(tokens(100)[None]).past_key_values
        assert cache.host_rows.host_bytes > 0
        cache.reset()
        assert cache.host_rows.host_bytes == 0
        model(tokens(30).view(3, 10), past_key_values=cache)
        assert [row.length for row in cache.kv.rows] == [10, 10, 10]


def test_a_forward_that_failed_is_forgotten(model_of: Any, timing: None) -> None:
    model, row = model_of("llama_mha"), tokens(60)[None]
    with on_host(model, recompute=0.5), torch.no_grad():
        with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"):
            model(row[:, :50])
        cache = model(row[:, :50]).past_key_values
        with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"):
            model(row[:, 50:55], past_key_values=cache)
        ours = model(row[:, 50:], past_key_values=cache).logits
    with torch.no_grad():
        assert_close(ours, model(row).logits[:, 50:])


def test_the_scheduler_decides(model_of: Any, timing: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With rates from a file, as on a machine with a bus: its share, and the same logits."""
    monkeypatch.setattr(setup, "has_bus", lambda device: True)
    file = tmp_path / "profile.json"
    profile(recompute=tuple(Timing(n, n * SHAPE.phi / 4e10) for n in (1, 1000))).save(file)
    model, batch = model_of("opt"), ragged(45, 18)
    stock = greedy(model, batch, 12)
    with on_host(model, profile=file) as handle:
        ours = greedy(model, batch, 12)
        assert not handle.offload.reason
        assert 10 < recomputed(handle) < 55
    assert_same_generation(ours, stock)
    with deltakv.apply(model_of("qwen2"), deltakv.Full(), kv_device=host(profile=file)) as handle:
        assert "grouped-query" in handle.offload.reason, "nothing needs to be measured"


def test_another_schedule_for_the_same_cache(model_of: Any) -> None:
    """A benchmark's variants share what lies in host memory, and X no further than it was kept."""
    model, row = model_of("opt"), tokens(60)[None]
    with torch.no_grad(), on_host(model, recompute=0.5) as handle:
        expected = model(row, use_cache=False).logits[:, -1]
        cache = handle.new_cache(max_length=60)
        model(row[:, :59], past_key_values=cache)
        for share, schedule in ((0.0, "serial"), (0.3, "serial"), (0.3, "pipelined"), (0.9, "pipelined")):
            rows = cache.host_rows
            rows.change(host(overlap=False, schedule=schedule), FixedShare(share, Schedule(schedule)))
            assert_close(model(row[:, 59:], past_key_values=cache).logits[:, -1], expected)
            assert recomputed(handle) == min(int(share * 59), 30)
            cache.crop(-1)
        with pytest.raises(deltakv.ConfigError, match="use a new cache"):
            rows.change(host(bits=8), rows.splitter)


def test_statistics_count_as_on_the_device(model_of: Any) -> None:
    model, batch = model_of("opt"), ragged(30, 12)
    counts = []
    for where in ("device", host(recompute=0.5)):
        with deltakv.apply(model, deltakv.Full(), kv_device=where) as handle:
            greedy(model, batch, 8)
            counts.append((handle.stats.steps, handle.stats.rows, handle.stats.attended_tokens))
    assert counts[0] == counts[1]


def test_a_compiled_model(tiny_model: Any) -> None:
    """`torch.compile` breaks the graph where the cache is; the logits are the same."""
    model, row = tiny_model("llama_mha"), tokens(40)[None]
    with torch.no_grad():
        expected = model(row).logits
        with on_host(model, recompute=0.5):
            compiled = torch.compile(model, backend="eager")
            cache = compiled(row[:, :30]).past_key_values
            assert_close(compiled(row[:, 30:], past_key_values=cache).logits, expected[:, 30:])
    torch.compiler.reset()
