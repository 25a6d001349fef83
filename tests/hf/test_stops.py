"""`generate` that learns a step late that all rows have ended: its extra forward leaves no trace.

What reads the flag late is transformers' own, for a device with events; here those are of no consequence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import utils

import deltakv
from deltakv.integrations.hf import stops
from hf.harness import left_padded, tokens

SPARSE = deltakv.Delta(budget=64, recent=16, sinks=16, min_context=100)
ROWS = (20, 97, 150)


class NoEvent:
    """On the CPU whatever was asked for is there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a CUDA device. Gives the steps that each `generate` took back."""
    undone: list[int] = []
    monkeypatch.setattr(stops, "_is_supported", lambda device, cache, *_, **__: isinstance(cache, deltakv.PagedCache))
    monkeypatch.setattr(utils.torch, "Event", NoEvent)
    finish = utils.DeferredStopCheck.finish

    def counted(check: Any) -> int:
        undone.append(finish(check))
        return undone[-1]

    monkeypatch.setattr(utils.DeferredStopCheck, "finish", counted)
    return undone


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=40, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip


def end_tokens(model: Any, batch: dict[str, torch.Tensor]) -> list[int]:
    """Tokens that end all rows, each at another step, before the run is over."""
    model.generation_config.eos_token_id = None
    out = generate(model, batch).sequences[:, batch["input_ids"].shape[1] :]
    return [int(row[7 + 5 * index]) for index, row in enumerate(out)]


@pytest.mark.parametrize("method", [SPARSE, deltakv.Full()], ids=["delta", "full"])
@pytest.mark.parametrize("ends", [True, False])
def test_the_same_answer(tiny_model: Any, late: list[int], method: Any, ends: bool) -> None:
    model = tiny_model("qwen2")
    batch = left_padded([tokens(length, length) for length in ROWS])
    with deltakv.apply(model, method):
        eos = end_tokens(model, batch) if ends else None
    late.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stops, "_is_supported", lambda *_, **__: False)
        with deltakv.apply(model, method) as handle:
            want, counts = generate(model, batch, eos_token_id=eos), handle.stats.steps
    assert not late
    with deltakv.apply(model, method) as handle:
        got = generate(model, batch, eos_token_id=eos)
        assert handle.stats.steps == counts + (1 if ends else 0)
    assert late == [1 if ends else 0]
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.logits) == len(want.logits)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=0)


def test_the_cache_is_as_if_it_had_stopped_at_once(tiny_model: Any, late: list[int]) -> None:
    """A second turn on the returned cache, behind rows that ended at different steps."""
    model = tiny_model("llama")
    batch = left_padded([tokens(length, length) for length in ROWS])
    answers = []
    for deferred in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if not deferred:
                patch.setattr(stops, "_is_supported", lambda *_, **__: False)
            with deltakv.apply(model, SPARSE):
                eos = end_tokens(model, batch)
                first = generate(model, batch, eos_token_id=eos)
                cache = first.past_key_values
                width = first.sequences.shape[1]
                seen = cache.get_seq_length()
                ids = torch.cat([first.sequences, torch.stack([tokens(12, 5)] * len(ROWS))], 1)
                mask = torch.cat([batch["attention_mask"], torch.ones(len(ROWS), ids.shape[1] - width + 40)], 1)
                mask = torch.ones_like(ids)
                mask[:, : batch["input_ids"].shape[1]] = batch["attention_mask"]
                new = first.sequences[:, batch["input_ids"].shape[1] :]
                ended = torch.isin(new, torch.tensor(eos)).cumsum(1) - torch.isin(new, torch.tensor(eos)).long()
                mask[:, batch["input_ids"].shape[1] : width] = (ended == 0).long()
                second = model(ids[:, seen:], attention_mask=mask, past_key_values=cache).logits
        answers.append((seen, first.sequences, second))
    assert late[-1] == 1
    assert answers[0][0] == answers[1][0] and torch.equal(answers[0][1], answers[1][1])
    torch.testing.assert_close(answers[1][2], answers[0][2], atol=1e-5, rtol=0)


def test_others_are_left_alone(tiny_model: Any) -> None:
    """In force as long as any method is applied, for deltakv's caches on CUDA alone."""
    check = utils.DeferredStopCheck.is_supported
    cuda, mps = torch.device("cuda"), torch.device("mps")
    one, other = tiny_model("llama"), tiny_model("qwen2")
    first = deltakv.apply(one, SPARSE)
    with deltakv.apply(other, SPARSE) as handle:
        first.remove()
        cache = handle.new_cache()
        assert utils.DeferredStopCheck.is_supported(cuda, cache, True, is_assistant=False)
        assert not utils.DeferredStopCheck.is_supported(cuda, cache, True, is_assistant=True)
        assert not utils.DeferredStopCheck.is_supported(torch.device("cpu"), cache, True, is_assistant=False)
        assert not utils.DeferredStopCheck.is_supported(cuda, None, False, is_assistant=False)
        assert utils.DeferredStopCheck.is_supported(mps, None, False, is_assistant=False)
    assert utils.DeferredStopCheck.is_supported is check
    with deltakv.apply(tiny_model("gemma3"), SPARSE) as handle:
        assert not utils.DeferredStopCheck.is_supported(cuda, handle.new_cache(), False, is_assistant=False)
