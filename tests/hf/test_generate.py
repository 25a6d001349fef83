"""What a user of `generate` expects works, with stock's logits under a budget that covers the context."""

from __future__ import annotations

import copy
import string
import threading
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import deltakv
from hf.harness import KINDS, TOLERANCE, assert_close, assert_same_generation, greedy, left_padded, ragged, tokens

COVERING = deltakv.Delta(budget=1024, min_context=0)
#: One architecture with full attention everywhere, the two whose windows and sinks go other ways.
VARIED = ("llama", "gemma3", "gpt_oss")


#: The characters that stand for tokens 3 to 127.
CHARACTERS = string.ascii_letters + string.digits + "".join(chr(0x100 + index) for index in range(63))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{c: 3 + i for i, c in enumerate(CHARACTERS)}}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = Split("", "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def noisy_copy(tiny_model: Any, kind: str) -> Any:
    """The model that is right now and then as a draft of `tiny_model(kind)`: some noise on its weights."""
    model = tiny_model(kind)
    model.generation_config.eos_token_id = None
    # Random models are never sure: without this, every draft would stop at its first token.
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens = 4
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", VARIED)
def test_sampling_with_a_seed(model_of: Any, kind: str) -> None:
    model, batch = model_of(kind), ragged(40, 22)

    def sample() -> Any:
        torch.manual_seed(3)
        return model.generate(
            **batch,
            max_new_tokens=20,
            do_sample=True,
            temperature=0.9,
            top_p=0.95,
            num_return_sequences=2,
            return_dict_in_generate=True,
            output_logits=True,
        )

    stock = sample()
    with deltakv.apply(model, COVERING):
        ours = sample()
    assert ours.sequences.shape == (4, 60)
    assert not torch.equal(stock.sequences[0], stock.sequences[1])
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))
    assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_beams(model_of: Any, kind: str) -> None:
    model, batch = model_of(kind), ragged(40, 21)

    def search() -> Any:
        return model.generate(
            **batch,
            max_new_tokens=20,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )

    stock = search()
    with deltakv.apply(model, COVERING):
        ours = search()
    # Beams must change places for this to test anything.
    assert (stock.beam_indices[:, 1:] != stock.beam_indices[:, :-1]).any()
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(ours.beam_indices, stock.beam_indices)
    assert_close(ours.sequences_scores, stock.sequences_scores)


@pytest.mark.parametrize("kind", VARIED)
def test_rows_that_end_early(model_of: Any, kind: str) -> None:
    """The others go on as if nothing had happened."""
    model, batch = model_of(kind), ragged(30, 18)
    plain = greedy(model, batch, 20)
    end = int(plain.sequences[0, 30 + 5])
    assert end not in plain.sequences[1, 30:].tolist()
    stock = greedy(model, batch, 20, eos_token_id=end)
    assert stock.sequences[0, -1] == 0
    assert stock.sequences.shape == (2, 50)
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 20, eos_token_id=end), stock)


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming_tokens(model_of: Any) -> None:
    model, batch = model_of("llama"), ragged(30)
    streamer = Collector()
    with deltakv.apply(model, COVERING):
        out = greedy(model, batch, 15, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == out.sequences[0].tolist()


def test_streaming_text_from_another_thread(model_of: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """As chat programs do it: `generate` in a thread, text as it comes."""
    model, batch = model_of("llama"), ragged(30)
    stock = greedy(model, batch, 15).sequences[0, 30:]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with deltakv.apply(model, COVERING):
        thread = threading.Thread(
            target=model.generate,
            kwargs={**batch, "max_new_tokens": 15, "do_sample": False, "streamer": streamer},
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(stock)


def test_stop_strings(model_of: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model, batch = model_of("llama"), ragged(30)
    new = greedy(model, batch, 20).sequences[0, 30:].tolist()
    stop = tokenizer.decode(new[7:9])
    stock = greedy(model, batch, 20, stop_strings=[stop], tokenizer=tokenizer)
    assert stock.sequences.shape[1] < 50
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 20, stop_strings=[stop], tokenizer=tokenizer), stock)


def test_stopping_criteria_and_logits_processors(model_of: Any) -> None:
    model, batch = model_of("qwen2"), ragged(30, 9)

    class SumIsDivisible(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return input_ids.sum(dim=1) % 7 == 0

    options = {"stopping_criteria": [SumIsDivisible()], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    stock = greedy(model, batch, 30, **options)
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 30, **options), stock)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [16, 23])
def test_chunked_prefill(model_of: Any, kind: str, chunk: int) -> None:
    """Rows that are all padding in the first chunk, a last chunk of another size, against one prefill."""
    model, batch = model_of(kind), ragged(70, 33, 5)
    stock = greedy(model, batch, 10)
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 10, prefill_chunk_size=chunk), stock)


def test_chunked_prefill_that_ends_in_one_token(model_of: Any) -> None:
    model, batch = model_of("llama"), ragged(65, 40)
    stock = greedy(model, batch, 10)
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 10, prefill_chunk_size=32), stock)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_lookup(model_of: Any, kind: str) -> None:
    """Candidates come from the prompt, wrong ones are cropped away again."""
    model, batch = model_of(kind), left_padded([tokens(12).repeat(4)])
    stock = greedy(model, batch, 24)
    with deltakv.apply(model, COVERING) as handle:
        ours = greedy(model, batch, 24, prompt_lookup_num_tokens=3)
        assert handle.stats.steps < 23, "no candidate was ever accepted or tried"
    assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_assistant_model(model_of: Any, tiny_model: Any, kind: str) -> None:
    model, draft, batch = model_of(kind), noisy_copy(tiny_model, kind), ragged(40)
    stock = greedy(model, batch, 24)
    try:
        assert torch.equal(greedy(model, batch, 24, assistant_model=draft).sequences, stock.sequences)
    except RuntimeError as error:
        pytest.skip(f"stock transformers {transformers.__version__} cannot do it: {error}")
    with deltakv.apply(model, COVERING):
        assert torch.equal(greedy(model, batch, 24, assistant_model=draft).sequences, stock.sequences)


@pytest.mark.parametrize("kind", VARIED)
def test_as_the_assistant(model_of: Any, tiny_model: Any, kind: str) -> None:
    """The method at work in the draft model: its cache is cropped and carried from call to call."""
    target, draft, batch = model_of(kind), noisy_copy(tiny_model, kind), ragged(40)
    stock = greedy(target, batch, 24)
    with deltakv.apply(draft, COVERING) as handle:
        ours = greedy(target, batch, 24, assistant_model=draft)
        assert handle.stats.steps > 0
    assert torch.equal(ours.sequences, stock.sequences)


def test_pipeline(model_of: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_of("llama")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = [CHARACTERS[10:40], CHARACTERS[50:57]]
    options = {"max_new_tokens": 10, "do_sample": False, "batch_size": 2}
    stock = write(prompts, **options)
    with deltakv.apply(model, COVERING) as handle:
        assert write(prompts, **options) == stock
        assert handle.stats.rows == 18


def test_static_cache_model_default_is_named(tiny_model: Any) -> None:
    """A model whose own generation config asks for another cache is refused as an argument is."""
    model = tiny_model("llama")
    model.generation_config.cache_implementation = "static"
    with (
        deltakv.apply(model, COVERING),
        pytest.raises(deltakv.UnsupportedUseError, match="cache_implementation='static'"),
    ):
        model.generate(**ragged(10), max_new_tokens=2)


def test_hidden_states_are_given(tiny_model: Any) -> None:
    """Outputs other than attention weights stay available."""
    model, batch = tiny_model("llama"), ragged(20)  # its own: transformers leaves its capture hooks behind
    stock = greedy(model, batch, 4, output_hidden_states=True)
    with deltakv.apply(model, COVERING):
        ours = greedy(model, batch, 4, output_hidden_states=True)
    for step, layers in enumerate(stock.hidden_states):
        for layer, hidden in enumerate(layers):
            torch.testing.assert_close(ours.hidden_states[step][layer], hidden, atol=TOLERANCE, rtol=0)


def test_subclass_of_a_supported_model(tiny_model: Any) -> None:
    """A user's subclass that overrides nothing we touch is the model that it extends."""

    class Mine(LlamaForCausalLM):
        pass

    model, batch = Mine(tiny_model("llama").config).eval(), ragged(20)
    model.generation_config.eos_token_id = None
    stock = greedy(model, batch, 6)
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 6), stock)


@pytest.mark.parametrize("kind", VARIED)
def test_a_prefix_computed_once(model_of: Any, kind: str) -> None:
    """Prompt caching: `handle.new_cache()` filled with a common beginning, and a copy of it for each question."""
    model, prefix = model_of(kind), tokens(40)
    questions = [torch.cat([prefix, tokens(n, seed=n)])[None] for n in (10, 25)]
    stock = [greedy(model, {"input_ids": q, "attention_mask": torch.ones_like(q)}, 8) for q in questions]
    with deltakv.apply(model, COVERING) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            model(prefix[None], past_key_values=cache)
        for question, expected in zip(questions, stock, strict=True):
            batch = {"input_ids": question, "attention_mask": torch.ones_like(question)}
            assert_same_generation(greedy(model, batch, 8, past_key_values=copy.deepcopy(cache)), expected)
        assert cache.get_seq_length() == 40


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32], ids=str)
def test_masks_of_any_dtype(model_of: Any, dtype: torch.dtype) -> None:
    model, batch = model_of("llama"), ragged(30, 12)
    stock = greedy(model, batch, 6)
    with deltakv.apply(model, COVERING):
        ours = greedy(model, {**batch, "attention_mask": batch["attention_mask"].to(dtype)}, 6)
    assert_same_generation(ours, stock)
