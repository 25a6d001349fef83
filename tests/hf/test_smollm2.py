"""The real SmolLM2: the same numbers as stock transformers, and evaluation mode as true decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deltakv
from deltakv.evals.texts import builtin_text
from deltakv.loading.model import load_model, load_tokenizer
from deltakv.loading.source import locate

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Any, torch.Tensor]]:
    """The model in fp32, and the ids of some real text."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    path = locate("smollm2")
    ids = load_tokenizer(path)(builtin_text()[:20_000], return_tensors="pt").input_ids
    yield load_model(path, dtype="float32").eval(), ids
    torch.set_num_threads(threads)


def test_budget_that_covers_the_context(smollm2: tuple[Any, torch.Tensor]) -> None:
    model, ids = smollm2
    prompt = ids[:, :300]
    options: dict[str, Any] = {
        "max_new_tokens": 256,
        "min_new_tokens": 256,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    stock = model.generate(prompt, **options)
    with deltakv.apply(model, deltakv.Delta(budget=1024, min_context=0)) as handle:
        ours = model.generate(prompt, **options)
    assert handle.stats.sparse_rows == 0
    assert ours.sequences.shape[1] == 556
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-4, rtol=0)


def test_evaluation_mode_is_true_decoding(smollm2: tuple[Any, torch.Tensor]) -> None:
    model, ids = smollm2
    row = ids[:, :1000]
    with torch.no_grad(), deltakv.apply(model, deltakv.Delta(budget=256, min_context=0)) as handle:
        cache = handle.new_cache(1000)
        model(row[:, :968], past_key_values=cache)
        with handle.positions():
            together = model(row[:, 968:], past_key_values=cache).logits[0]
        attended = handle.stats.attended_tokens
        cache.crop(-32)
        handle.stats.reset()
        single = torch.cat([model(row[:, i : i + 1], past_key_values=cache).logits[0] for i in range(968, 1000)])
        assert handle.stats.attended_tokens == attended
        assert handle.stats.sparse_rows == 32
    torch.testing.assert_close(together, single, atol=1e-4, rtol=0)
