"""The model is given back as it was: after the block, after an error, and after a handle without a block."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

import deltakv
from hf.conftest import fingerprint
from hf.harness import KINDS, SMALL, assert_same_generation, decode, failing_layer, greedy, ragged, tokens

METHOD = deltakv.Delta(**SMALL)


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("in the middle")


@pytest.fixture(params=KINDS)
def before(request: pytest.FixtureRequest, model_of: Any) -> Any:
    """A model, its fingerprint, and its logits, to be the same to the bit afterwards."""
    model, batch = model_of(request.param), ragged(80, 30)
    generated = greedy(model, batch, 4)
    with torch.no_grad():
        logits = model(**batch).logits
    marks = fingerprint(model)

    def check() -> None:
        assert fingerprint(model) == marks
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(greedy(model, batch, 4).logits, generated.logits)

    return model, batch, check


def test_after_the_block(before: Any) -> None:
    model, batch, check = before
    with deltakv.apply(model, METHOD):
        greedy(model, batch, 4)
        assert model.config._attn_implementation.startswith("deltakv_")
    check()


def test_after_an_exception_inside_generate(before: Any) -> None:
    model, batch, check = before
    with pytest.raises(RuntimeError, match="in the middle"), deltakv.apply(model, METHOD):
        model.generate(**batch, max_new_tokens=4, stopping_criteria=[Fails()])
    check()


class Fails(StoppingCriteria):
    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("in the middle")


def test_after_an_exception_inside_a_layer(before: Any) -> None:
    model, batch, check = before
    with failing_layer(model), pytest.raises(RuntimeError, match="in the middle"), deltakv.apply(model, METHOD):
        greedy(model, batch, 4)
    check()


def test_handle_without_a_block(before: Any) -> None:
    model, batch, check = before
    handle = deltakv.apply(model, METHOD)
    greedy(model, batch, 4)
    assert handle.stats.steps == 3
    handle.remove()
    check()
    handle.remove()
    check()
    assert handle.stats.steps == 3, "what was counted stays readable"


def test_removing_inside_the_block(model_of: Any) -> None:
    model = model_of("llama")
    with deltakv.apply(model, METHOD) as first:
        first.remove()
        with deltakv.apply(model, deltakv.Full()) as second:
            first.remove()
            greedy(model, ragged(20), 3)
            assert second.stats.steps == 2


def interrupt(model: Any, call: Callable[[], Any]) -> None:
    """Ctrl-C in the middle of a forward: not an `Exception`, so hooks that run "always" do not run."""

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        call()
    hook.remove()


def test_interrupted_by_the_keyboard(model_of: Any) -> None:
    """In a notebook: the block is left, and the cache that the forward was writing to is refused by the stock model."""
    model, batch = model_of("llama"), ragged(20)
    stock = greedy(model, batch, 3)
    with deltakv.apply(model, METHOD), torch.no_grad():
        cache = model(tokens(20)[None]).past_key_values
        interrupt(model, lambda: model(tokens(1)[None], past_key_values=cache))
    assert torch.equal(greedy(model, batch, 3).logits, stock.logits)
    with pytest.raises(deltakv.UnsupportedUseError, match="no method is applied"):
        model(tokens(1)[None], past_key_values=cache)


def test_interrupted_and_then_used_from_another_thread(model_of: Any) -> None:
    """A cell is interrupted; the next one streams, for which `generate` runs in a thread."""
    model, batch, results = model_of("llama"), ragged(90), []
    with deltakv.apply(model, METHOD):
        expected = greedy(model, batch, 4)
        interrupt(model, lambda: greedy(model, batch, 4))

        def generate() -> None:
            try:
                results.append(greedy(model, batch, 4))
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        assert not isinstance(results[0], Exception), repr(results[0])
        assert_same_generation(results[0], expected)


def test_apply_that_fails_half_way(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while hooking undoes what was already hooked, and the model can be applied to again."""
    model = model_of("llama")
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "register_forward_hook", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            deltakv.apply(model, METHOD)
    with deltakv.apply(model, METHOD):
        pass


def test_user_s_own_attributes_come_back(tiny_model: Any) -> None:
    """What a user has put on the model under a name that we override."""
    model = tiny_model("llama")

    def prepare(*_: Any) -> None:
        raise AssertionError("not while a method is applied")

    model._prepare_cache_for_generation = prepare
    with deltakv.apply(model, METHOD):
        greedy(model, ragged(20), 2)
    assert model.__dict__["_prepare_cache_for_generation"] is prepare


def test_two_models_at_once(model_of: Any) -> None:
    """Two models, also with one shared config, do not see each other's methods."""
    one, other = model_of("llama"), model_of("qwen3")
    batch = ragged(90)
    with deltakv.apply(one, METHOD):
        expected = greedy(one, batch, 4)
    stock = greedy(other, batch, 4)
    with deltakv.apply(one, METHOD) as first:
        assert torch.equal(greedy(other, batch, 4).logits, stock.logits)
        with deltakv.apply(other, deltakv.Full()) as second:
            assert_same_generation(greedy(other, batch, 4), stock)
            assert_same_generation(greedy(one, batch, 4), expected)
        assert (first.stats.steps, second.stats.steps) == (3, 3)
        assert_same_generation(greedy(one, batch, 4), expected)


def test_models_that_share_a_config(tiny_model: Any) -> None:
    """`from_config(model.config)` shares the object: a method on one must not turn up in the other."""
    one = tiny_model("llama")
    other = type(one)(one.config).eval()
    other.generation_config.eos_token_id = None
    assert other.config is one.config or other.config == one.config
    batch = ragged(90)
    stock = greedy(other, batch, 4)
    with deltakv.apply(one, METHOD):
        assert torch.equal(greedy(other, batch, 4).logits, stock.logits)


def test_a_second_method_through_a_shared_config_is_refused(tiny_model: Any) -> None:
    """The config names one attention for both models: handles removed out of order would leave it broken."""
    one = tiny_model("llama")
    other = type(one)(one.config).eval()
    if other.config is not one.config:
        other.config = one.config
    before = one.config._attn_implementation
    handle = deltakv.apply(one, METHOD)
    with pytest.raises(deltakv.UnsupportedUseError, match="shares its config"):
        deltakv.apply(other, deltakv.Full())
    handle.remove()
    assert one.config._attn_implementation == before
    with deltakv.apply(other, deltakv.Full()):
        greedy(other, ragged(20), 2)
    assert one.config._attn_implementation == before


def test_handles_one_after_the_other_do_not_pile_up(model_of: Any) -> None:
    model = model_of("llama")
    marks = fingerprint(model)
    for _ in range(20):
        with deltakv.apply(model, METHOD):
            pass
    assert fingerprint(model) == marks


class TestMemory:
    """KV memory goes when its cache goes, at once: no reference cycle waits for the garbage collector."""

    @pytest.fixture(autouse=True)
    def no_collector(self) -> Any:
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.parametrize("kind", ["llama", "gemma3"])
    def test_after_plain_calls(self, model_of: Any, kind: str) -> None:
        model = model_of(kind)
        with deltakv.apply(model, METHOD) as handle:
            handle.stats.record_picks = True
            _, cache = decode(model, ragged(90), tokens(2)[None])
            pool = weakref.ref(cache.kv.pool)
            keys = weakref.ref(cache.kv.pool.k[2])
            assert handle.cache is cache
            del cache
            assert pool() is None and keys() is None and handle.cache is None

    def test_after_generate(self, model_of: Any) -> None:
        model = model_of("llama")
        with deltakv.apply(model, METHOD) as handle:
            out = greedy(model, ragged(90), 3)
            pool = weakref.ref(out.past_key_values.kv.pool)
            del out
            assert pool() is None
            greedy(model, ragged(20), 3)
            assert handle.cache is None

    def test_after_evaluation_mode(self, model_of: Any) -> None:
        model = model_of("llama")
        with deltakv.apply(model, METHOD) as handle, torch.no_grad():
            cache = model(tokens(80)[None]).past_key_values
            pool = weakref.ref(cache.kv.pool)
            with handle.positions(picks=True, recall=True) as trace:
                model(tokens(20)[None], past_key_values=cache)
            del cache
            assert pool() is None
            assert trace.picks

    def test_after_a_forward_that_failed(self, model_of: Any) -> None:
        model = model_of("llama")
        with deltakv.apply(model, METHOD) as handle, torch.no_grad():
            cache = model(tokens(80)[None]).past_key_values
            pool = weakref.ref(cache.kv.pool)
            hook = model.model.layers[3].register_forward_pre_hook(fail)
            with contextlib.suppress(RuntimeError):
                model(tokens(1)[None], past_key_values=cache)
            hook.remove()
            handle.remove()
            del cache
            assert pool() is None


def test_model_goes_when_a_forgotten_handle_goes(tiny_model: Any) -> None:
    """A notebook that never calls `remove` and drops both: the model's memory must not stay for ever."""
    model = tiny_model("llama")
    handle = deltakv.apply(model, METHOD)
    greedy(model, ragged(20), 2)
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("method", [METHOD, deltakv.Full()], ids=["delta", "full"])
def test_copied_model_works_or_refuses(tiny_model: Any, method: Any) -> None:
    """A deep copy of a model with a method at work is a working copy or an error that says so, never wrong."""
    model, batch = tiny_model("llama"), ragged(90)
    model.generation_config.eos_token_id = None
    with deltakv.apply(model, method):
        expected = greedy(model, batch, 4)
        try:
            twin = copy.deepcopy(model)
        except deltakv.UnsupportedUseError:
            return
        assert_same_generation(greedy(twin, batch, 4), expected)


def test_saved_while_applied(model_of: Any, tmp_path: Path) -> None:
    """What `save_pretrained` writes knows nothing of the method, and loads as a stock model."""
    model, batch = model_of("llama"), ragged(30)
    stock = greedy(model, batch, 4)
    with deltakv.apply(model, METHOD):
        model.save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.glob("*.json") if "deltakv" in path.read_text()]
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    loaded.generation_config.eos_token_id = None
    assert_same_generation(greedy(loaded, batch, 4), stock)
