"""Decode steps that keep their books on the device: announced, compiled in one piece, interrupted, taken up again."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, StoppingCriteria

import deltakv
from hf.harness import (
    SMALL,
    assert_close,
    assert_same_generation,
    decode,
    failing_layer,
    greedy,
    positions,
    ragged,
    tokens,
)

#: Architectures without a sliding window: all their steps can be announced.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "opt")

COVERING = deltakv.Delta(budget=1024, min_context=0)
SPARSE = deltakv.Delta(**SMALL, plan="FSRRSR")

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


def counted(handle: Any) -> tuple[int, ...]:
    stats = handle.stats
    return stats.steps, stats.rows, stats.sparse_rows, stats.attended_tokens, stats.full_tokens, stats.kv_bytes


def lengths(cache: Any) -> list[int]:
    return [row.length for row in cache.kv.rows]


def an_end(model: Any, batch: dict[str, Tensor], steps: int = 20) -> tuple[int, list[int]]:
    """A token that some rows make in that many steps and others do not, a third of the way if possible; and how many
    tokens each row makes until it has made that one, or to the last step."""
    new = greedy(model, batch, steps).sequences[:, batch["input_ids"].shape[1] :].tolist()
    made = {
        token: [row.index(token) + 1 if token in row else steps for row in new]
        for token in range(128)
        if 0 < sum(token in row for row in new) < len(new)
    }
    end = min(made, key=lambda token: abs(min(made[token]) - steps // 3))
    assert 1 < min(made[end]) < steps - 2
    return end, made[end]


class Looking(StoppingCriteria):
    """Stops nothing, and calls `look` with the number of columns."""

    def __init__(self, look: Callable[[int], Any]) -> None:
        self._look = look

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._look(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Talk:
    """A batch under plain calls, each compared with a forward of the model over all its tokens, without a cache."""

    def __init__(self, model: Any, reference: Any, handle: Any, batch: dict[str, Tensor], cache: Any) -> None:
        self.model, self.handle, self.cache = model, handle, cache
        self._reference = reference
        width = batch["input_ids"].shape[1]
        self.ids, self.mask = batch["input_ids"][:, :0], batch["attention_mask"][:, :0]
        self.say(batch["input_ids"], real=batch["attention_mask"])
        assert self.ids.shape[1] == width

    def say(self, new: Tensor, *, real: Tensor | None = None, masked: bool = True, announce: bool = False) -> None:
        """A forward of `new`. real: their mask. masked: give the mask."""
        self.ids = torch.cat([self.ids, new], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(new) if real is None else real], dim=1)
        options: dict[str, Any] = {}
        if masked:
            options = {"attention_mask": self.mask, "position_ids": positions(self.mask)[:, -new.shape[1] :]}
        if announce:
            assert self.handle.announce(self.cache)
        logits = self.model(new, past_key_values=self.cache, **options).logits[:, -1]
        with torch.no_grad():
            want = self._reference(
                self.ids, attention_mask=self.mask, position_ids=positions(self.mask), use_cache=False
            )
        assert_close(logits, want.logits[:, -1])
        assert int(self.cache.get_seq_length()) == self.ids.shape[1]

    def steps(self, count: int, **options: Any) -> None:
        for _ in range(count):
            self.say(tokens(len(self.ids), seed=self.ids.shape[1])[:, None], **options)

    def rows(self, indices: list[int]) -> None:
        self.ids, self.mask = self.ids[indices], self.mask[indices]

    def drop(self, columns: int) -> None:
        self.ids, self.mask = self.ids[:, :-columns], self.mask[:, :-columns]


@pytest.fixture
def talk(model_of: Any, tiny_model: Any) -> Iterator[Callable[..., Talk]]:
    """`talk(*lengths, kind="llama", cache={})` begins one, under a budget that covers it; `cache`: of `new_cache`."""
    handles = []

    def begin(*rows: int, kind: str = "llama", cache: dict[str, Any] | None = None) -> Talk:
        handle = deltakv.apply(model_of(kind), COVERING)
        handles.append(handle)
        return Talk(model_of(kind), tiny_model(kind), handle, ragged(*rows), handle.new_cache(**cache or {}))

    with torch.no_grad():
        yield begin
    for handle in handles:
        handle.remove()


class TestOneGraph:
    @pytest.mark.parametrize("kind", KINDS)
    def test_two_generates(self, model_of: Any, graphs: Graphs, kind: str) -> None:
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

    def test_rows_that_end_cross_min_context_or_differ_much(self, model_of: Any, graphs: Graphs) -> None:
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
    def test_plain_loop(self, tiny_model: Any, graphs: Graphs, kind: str) -> None:
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

    def test_turns_on_a_static_cache(self, model_of: Any, graphs: Graphs) -> None:
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

    def test_sampling_with_rows_that_end(self, model_of: Any, graphs: Graphs) -> None:
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

    def test_what_the_host_lays_out_is_not_compiled(self, model_of: Any, graphs: Graphs) -> None:
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

    def test_nothing_is_kept_alive(self, model_of: Any, graphs: Graphs) -> None:
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


class TestFinishedRows:
    @pytest.mark.parametrize("recorded", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_stop_growing(self, model_of: Any, kind: str, recorded: bool) -> None:
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
    def test_second_turn(self, model_of: Any, kind: str) -> None:
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

    def test_without_an_end_token_rows_go_on(self, model_of: Any) -> None:
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
    def test_somebody_looks_in_between(self, model_of: Any, look: str) -> None:
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
    def test_a_plain_loop_goes_on_with_all_rows(self, model_of: Any, announce: bool) -> None:
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

    def test_the_next_generate_goes_on_with_all_rows(self, model_of: Any) -> None:
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

    def test_announced_by_hand(self, model_of: Any) -> None:
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


class TestInTheMiddle:
    """Operations on a cache whose books are on the device, each followed by more decoding."""

    @pytest.mark.parametrize("cache", [{}, {"max_length": 200}, {"max_length": 200, "static": True}], ids=str)
    def test_of_decoding(self, talk: Any, cache: dict[str, Any]) -> None:
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
    def test_of_all_kinds_of_calls(self, talk: Any, kind: str) -> None:
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
    def test_ragged_rows_announced_or_masked(self, talk: Any, kind: str) -> None:
        it = talk(30, 12, 21, kind=kind)
        for _ in range(3):
            it.steps(3, masked=True)
            it.steps(20, masked=False, announce=True)
            with pytest.raises(deltakv.MaskError):
                it.model(torch.full((3, 1), 5), past_key_values=it.cache)

    def test_a_layer_that_fails(self, talk: Any) -> None:
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

    def test_a_layer_that_fails_in_generate(self, model_of: Any) -> None:
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

    def test_growth(self, model_of: Any) -> None:
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

    def test_a_batch_of_another_size_is_refused(self, talk: Any) -> None:
        """Also where a forward of one row could be taken for one of them all."""
        it = talk(20, 20)
        for rows in (1, 3):
            it.handle.announce(it.cache)
            with pytest.raises(deltakv.UnsupportedUseError, match=f"2 rows, but this forward has {rows}"):
                it.model(torch.full((rows, 1), 5), past_key_values=it.cache)
        it.steps(2, masked=False)

    def test_inputs_prepared_by_the_user_keep_their_mask(self, model_of: Any) -> None:
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


class TestSideBySide:
    def test_caches_in_turns(self, talk: Any, model_of: Any) -> None:
        """Batches of different sizes: each step is counted for its own batch, and bytes are those of the last one."""
        one = talk(20, 20)
        other = Talk(one.model, one._reference, one.handle, ragged(50, 50, 50), one.handle.new_cache())
        for _ in range(5):
            for it in (one, other):
                it.steps(1, masked=False)
                assert one.handle.stats.kv_bytes == it.cache.state.decoding.kv_reader()()
        assert (one.handle.stats.rows, one.handle.stats.steps) == (5 * (2 + 3), 10)
        assert one.handle.stats.full_tokens == 6 * sum(2 * (21 + n) + 3 * (51 + n) for n in range(5))
        assert lengths(one.cache) == [25, 25] and lengths(other.cache) == [55, 55, 55]

    def test_handles_in_turn(self, model_of: Any) -> None:
        """One cache under three handles; each counts its own steps."""
        model, ids, new = model_of("llama"), tokens(200).view(2, 100), tokens(18).view(2, 9)
        cache, logits = None, []
        with torch.no_grad():
            for number, method in enumerate((COVERING, SPARSE, COVERING)):
                with deltakv.apply(model, method) as handle:
                    if cache is None:
                        cache = handle.new_cache()
                        model(ids, past_key_values=cache)
                    steps = new[:, 3 * number : 3 * number + 3].T[..., None]
                    logits.append(torch.cat([model(token, past_key_values=cache).logits for token in steps], dim=1))
                    assert (handle.stats.steps, handle.stats.rows) == (3, 6)
                    assert handle.announce(cache)  # and left so
                with pytest.raises(deltakv.UnsupportedUseError):
                    model(steps[0], past_key_values=cache)
            stock = model(torch.cat([ids, new], dim=1)).logits[:, 100:]
        assert lengths(cache) == [109, 109]
        assert_close(logits[0], stock[:, :3])
        assert not torch.allclose(logits[1], stock[:, 3:6], atol=1e-2)

    @pytest.mark.parametrize("kind", ["llama", "qwen2"])
    def test_threads(self, model_of: Any, kind: str) -> None:
        """Two `generate`s at once, of batches that differ in size and in where rows end, while a third thread looks at
        the statistics."""
        model, batches = model_of(kind), [ragged(60, 44), ragged(30, 41, 12, seed=1)]
        with deltakv.apply(model, SPARSE) as handle:
            ends = [an_end(model, batch)[0] for batch in batches]
            handle.stats.reset()
            alone = [greedy(model, batch, 30, eos_token_id=end) for batch, end in zip(batches, ends, strict=True)]
            want = counted(handle)[:5]
            handle.stats.reset()
            together: dict[int, Any] = {}
            done = threading.Event()

            def run(index: int) -> None:
                together[index] = greedy(model, batches[index], 30, eos_token_id=ends[index])

            def look() -> None:
                while not done.is_set():
                    assert handle.stats.rows <= want[1]

            threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
            looking = threading.Thread(target=look)
            for thread in [*threads, looking]:
                thread.start()
            for thread in threads:
                thread.join()
            done.set()
            looking.join()
            assert counted(handle)[:5] == want
        for index, expected in enumerate(alone):
            assert torch.equal(together[index].sequences, expected.sequences)
            assert torch.equal(together[index].logits, expected.logits)

    @pytest.mark.parametrize("modes", [(False, True), (True, False)], ids=str)
    def test_inference_mode_and_back(self, model_of: Any, modes: tuple[bool, bool]) -> None:
        """Tensors made in one mode are written in the other: the cache's, the statistics', the compiler's none."""
        model, batch = model_of("llama"), ragged(30, 18)
        with deltakv.apply(model, COVERING) as handle:
            cache, outs, mask, ids = handle.new_cache(), [], batch["attention_mask"], batch["input_ids"]
            for inference in (*modes, *modes):
                with torch.inference_mode() if inference else nullcontext():
                    out = greedy(model, {"input_ids": ids, "attention_mask": mask}, 8, past_key_values=cache)
                outs.append(out.logits.clone())
                ids = out.sequences.clone()
                mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
            assert handle.stats.rows == 31 * 2
        stock = greedy(model, batch, 32)
        assert torch.equal(ids, stock.sequences)
        assert_close(torch.cat(outs), stock.logits)
