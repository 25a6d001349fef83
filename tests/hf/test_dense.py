"""A budget that covers the context gives the logits of the stock model, on every supported architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from hf.harness import KINDS, TOLERANCE, assert_close, assert_same_generation, decode, greedy, ragged, tokens

METHODS = {"full": deltakv.Full(), "delta": deltakv.Delta(budget=1024, min_context=0)}


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode(model_of: Any, kind: str, method: Any) -> None:
    model = model_of(kind)
    batch, continuation = ragged(75), tokens(8, seed=1)[None]
    stock, _ = decode(model, batch, continuation)
    with deltakv.apply(model, method):
        ours, cache = decode(model, batch, continuation)
        assert isinstance(cache, deltakv.PagedCache)
        assert cache.get_seq_length() == 83
    assert_close(ours, stock)


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_of_a_prompt(model_of: Any, kind: str) -> None:
    model, ids = model_of(kind), tokens(50)[None]
    with torch.no_grad():
        stock = model(ids).logits
        with deltakv.apply(model, METHODS["delta"]) as handle:
            ours = model(ids)
            assert ours.past_key_values is handle.cache
            assert isinstance(handle.cache, deltakv.PagedCache)
    assert_close(ours.logits, stock)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation(model_of: Any, kind: str, method: Any) -> None:
    model, batch = model_of(kind), ragged(40)
    stock = greedy(model, batch, 24)
    with deltakv.apply(model, method) as handle:
        assert_same_generation(greedy(model, batch, 24), stock)
        assert handle.stats.steps == 23


@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_batch(model_of: Any, kind: str, method: Any) -> None:
    model, batch = model_of(kind), ragged(40, 1, 16, 33)
    stock = greedy(model, batch, 20)
    with deltakv.apply(model, method):
        assert_same_generation(greedy(model, batch, 20), stock)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_a_left_padded_batch_by_hand(model_of: Any, kind: str) -> None:
    model, batch = model_of(kind), ragged(70, 7, 32)
    continuation = torch.stack([tokens(20, seed=row + 5) for row in range(3)])
    stock, _ = decode(model, batch, continuation)
    with deltakv.apply(model, METHODS["delta"]) as handle:
        assert_close(decode(model, batch, continuation)[0], stock)
        assert handle.stats.rows == 60


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3", "gpt_oss"])
def test_right_padded_prompt(model_of: Any, kind: str) -> None:
    """Padding behind the tokens: the logits of real tokens, then one decode step that goes on after the padding."""
    model = model_of(kind)
    ids, mask = tokens(60).view(2, 30).clone(), torch.ones(2, 30, dtype=torch.long)
    ids[1, 18:], mask[1, 18:] = 0, 0
    step = torch.tensor([[5], [6]])

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            first = model(ids, attention_mask=mask)
            longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            second = model(
                step,
                attention_mask=longer,
                position_ids=torch.tensor([[30], [18]]),
                past_key_values=first.past_key_values,
            )
        return first.logits[mask.bool()], second.logits

    stock = run()
    with deltakv.apply(model, METHODS["delta"]):
        ours = run()
    assert_close(ours[0], stock[0])
    assert_close(ours[1], stock[1])


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_eager_attention_model(tiny_model: Any, kind: str) -> None:
    model, batch = tiny_model(kind), ragged(40, 9)
    model.set_attn_implementation("eager")
    stock = greedy(model, batch, 8)
    with deltakv.apply(model, METHODS["delta"]):
        assert_same_generation(greedy(model, batch, 8), stock)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3"])
def test_inputs_embeds(model_of: Any, kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(tokens(40)[None])
        stock_forward = model(inputs_embeds=embeds).logits
        stock = greedy(model, {"inputs_embeds": embeds}, 12)
        with deltakv.apply(model, METHODS["delta"]):
            assert_close(model(inputs_embeds=embeds).logits, stock_forward)
            assert_same_generation(greedy(model, {"inputs_embeds": embeds}, 12), stock)


@pytest.mark.parametrize("kind", KINDS)
def test_without_cache_the_model_is_stock(model_of: Any, kind: str) -> None:
    """`use_cache=False` has nothing to read sparsely: one forward with the model's own attention, to the bit."""
    model, batch = model_of(kind), ragged(40, 11)
    with torch.no_grad():
        stock = model(**batch, use_cache=False).logits
        with deltakv.apply(model, deltakv.Delta(budget=16, recent=16, sinks=0)) as handle:
            ours = model(**batch, use_cache=False)
            assert ours.past_key_values is None
            assert handle.cache is None
    assert torch.equal(ours.logits, stock)


def test_loss_and_gradient_without_cache(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), tokens(40)[None]
    stock = model(ids, labels=ids, use_cache=False).loss
    stock.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with deltakv.apply(model, METHODS["delta"]):
        ours = model(ids, labels=ids, use_cache=False).loss
        ours.backward()
    assert torch.equal(ours, stock)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_loss_through_the_cache(model_of: Any) -> None:
    model, ids = model_of("qwen3"), tokens(40)[None]
    with torch.no_grad():
        stock = model(ids, labels=ids).loss
        with deltakv.apply(model, METHODS["delta"]):
            assert_close(model(ids, labels=ids).loss, stock)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_chunks_by_hand(model_of: Any, kind: str) -> None:
    """A prompt in three forwards, the last of a size of its own; and the base model without a head."""
    model, ids = model_of(kind), tokens(90)[None]
    with torch.no_grad():
        stock = model(ids).logits
        with deltakv.apply(model, METHODS["delta"]) as handle:
            cache = handle.new_cache()
            parts = [model(part, past_key_values=cache).logits for part in ids.split([40, 33, 17], dim=1)]
            assert_close(torch.cat(parts, dim=1), stock)
            cache = handle.new_cache(max_length=90)
            hidden = [model.base_model(part, past_key_values=cache) for part in ids.split(45, dim=1)]
            logits = model.lm_head(torch.cat([h.last_hidden_state for h in hidden], dim=1))
            assert_close(logits, stock)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_exact_as_stock_bf16(tiny_model: Any, kind: str) -> None:
    """Error against fp32 on the same bf16 weights: at most 1.5 times that of stock bf16, mean over logits."""
    model = tiny_model(kind).to(torch.bfloat16)
    batch = ragged(90, 40)
    continuation = torch.stack([tokens(12, seed=row + 3) for row in range(2)])
    stock, _ = decode(model, batch, continuation)
    with deltakv.apply(model, METHODS["delta"]):
        ours, _ = decode(model, batch, continuation)
    assert ours.dtype == torch.bfloat16
    reference, _ = decode(model.float(), batch, continuation)
    stock_error, our_error = ((x.float() - reference).abs().mean() for x in (stock, ours))
    assert stock_error > 100 * TOLERANCE * 0.01
    assert our_error <= 1.5 * stock_error


def test_positional_arguments_of_forward(model_of: Any) -> None:
    """`model(ids, mask)` without keywords reaches the cache just the same."""
    model, batch = model_of("llama"), ragged(30, 12)
    with torch.no_grad():
        stock = model(batch["input_ids"], batch["attention_mask"]).logits
        base = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        with deltakv.apply(model, METHODS["delta"]):
            real = batch["attention_mask"].bool()
            assert_close(model(batch["input_ids"], batch["attention_mask"]).logits[real], stock[real])
            ours = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            assert_close(ours[real], base[real])


def test_long_row_crosses_the_growth_of_the_pool(model_of: Any) -> None:
    """A cache that starts small and grows many times over, without a length given ahead."""
    model, batch = model_of("llama"), ragged(3)
    continuation = tokens(180, seed=2)[None]
    stock, _ = decode(model, batch, continuation)
    with deltakv.apply(model, METHODS["delta"]):
        assert_close(decode(model, batch, continuation)[0], stock)


def test_position_ids_are_passed_on(model_of: Any) -> None:
    """Positions that start again inside a row: with a cache, stock transformers sees one row all the same."""
    model, ids = model_of("llama"), tokens(24)[None]
    places = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        stock = [model(ids, position_ids=places, use_cache=use).logits for use in (True, False)]
        assert not torch.allclose(*stock, atol=1e-2)
        with deltakv.apply(model, METHODS["delta"]):
            assert_close(model(ids, position_ids=places, use_cache=True).logits, stock[0])
            assert torch.equal(model(ids, position_ids=places, use_cache=False).logits, stock[1])
