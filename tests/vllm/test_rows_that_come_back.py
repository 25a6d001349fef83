"""What an engine does with K and V that another attention made than would now: rows that were preempted are prefilled
anew, with full attention; hits on generated blocks find what sparse decoding made. Both exactly, and how far apart."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from harness import SPARSE, Driver, Row, ask, prompt
from transformers import AutoTokenizer

import deltakv
from deltakv.loading import smollm2

CLOSE = 2e-4
LONG, MIDDLE = prompt(300, 1), prompt(171, 2)


def first_apart(one: Row, other: Row) -> int:
    """The first token whose log-probabilities are not those of the other row; tokens before it are the same."""
    apart = (one.logprobs - other.logprobs).abs().amax(1) > CLOSE
    first = int(apart.int().argmax()) if apart.any() else len(apart)
    assert one.tokens[:first] == other.tokens[:first]
    return first


def test_a_preempted_row_goes_on_as_a_new_request_would(engines: Driver, tiny: str) -> None:
    """34 blocks, one of them vLLM's own, are too few for both rows to their ends: the later one is preempted."""
    settings = {"settings": SPARSE, "enable_prefix_caching": False, "max_model_len": 512}
    (alone,), (long_alone,) = engines.run(tiny, ask(MIDDLE, tokens=40), ask(LONG, tokens=40), **settings)
    ((long, row),) = engines.run(tiny, ask(LONG, MIDDLE, tokens=40), num_gpu_blocks_override=34, **settings)
    assert first_apart(long, long_alone) == 40, "the earlier row is not touched"
    resumed = first_apart(row, alone)
    assert 10 < resumed < 40, "there was a preemption"
    ((again,),) = engines.run(tiny, ask(MIDDLE + row.tokens[:resumed], tokens=40 - resumed), **settings)
    assert again.tokens == row.tokens[resumed:]
    assert float((again.logprobs - row.logprobs[resumed:]).abs().max()) < CLOSE


def test_a_hit_on_generated_blocks_goes_on_with_what_decoding_made(engines: Driver, tiny: str) -> None:
    """A second turn finds the K and V that the first turn's sparse steps stored: transformers' second turn on the same
    cache, cut back to what was found. Without the hit the answer is another one, by more than rounding."""
    (first,), turn = engines.run(tiny, ask(LONG, tokens=41), settings=SPARSE)[0], prompt(9, 4)
    second = LONG + first.tokens[:40] + turn
    _, (hit,) = engines.run(tiny, ask(LONG, tokens=41), ask(second, tokens=1), settings=SPARSE)
    ((miss,),) = engines.run(tiny, ask(second, tokens=1), settings=SPARSE)
    assert (hit.cached, miss.cached) == (336, 0)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    options = {key: value for key, value in SPARSE.items() if key != "algorithm"}
    with torch.inference_mode(), deltakv.apply(model, deltakv.Delta(**options)) as handle:
        cache = handle.new_cache()
        model(torch.tensor([LONG]), past_key_values=cache)
        for token in first.tokens[:40]:
            model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(hit.cached)
        logits = model(torch.tensor([second[hit.cached :]]), past_key_values=cache).logits[0, -1]
    assert float((torch.log_softmax(logits, -1) - hit.logprobs[0]).abs().max()) < CLOSE
    assert float((miss.logprobs - hit.logprobs).abs().max()) > 10 * CLOSE


@pytest.mark.model
def test_drift_of_a_real_model_is_small(engines: Driver) -> None:
    """SmolLM2, 64 generated tokens found again, 8% of the prompt."""
    folder = str(smollm2.folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(" ".join(pydoc_data.topics.topics.values())[:20000])["input_ids"][:700]
    engine = {"settings": {"budget": 256, "min_context": 256}, "max_model_len": 1024}
    ((first,),) = engines.run(folder, ask(text, tokens=65, logprobs=False), **engine)
    second = text + first.tokens[:64] + tokenizer("\n\nIn short,")["input_ids"]
    _, (hit,) = engines.run(folder, ask(text, tokens=65, logprobs=False), ask(second, tokens=4), **engine)
    ((miss,),) = engines.run(folder, ask(second, tokens=4), **engine)
    assert hit.cached > len(text) and hit.tokens == miss.tokens
    drift = (miss.logprobs.exp() * (miss.logprobs - hit.logprobs)).sum(1)
    assert 1e-7 < float(drift.max()) < 0.05, drift
