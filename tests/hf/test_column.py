"""Several batches column by column, with weights in host memory: the logits of each are its own, and the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltakv
from deltakv.integrations.hf.column import Column
from deltakv.offload import memory
from deltakv.offload.lanes import Lanes
from deltakv.offload.planner import FixedShare
from deltakv.offload.scheduler import Schedule
from hf.harness import assert_close, tokens
from offload.delays import EagerCompute, FailingLane, LateLane, refusing

HOST: dict[str, Any] = {"chunk_mib": 12 / 1024, "chunks": 3}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs that hold a few weights, so that a layer's lie in many."""
    monkeypatch.setattr(memory, "SLAB_BYTES", 1 << 14)
    monkeypatch.setattr(memory, "LEAST_SLAB_BYTES", 1 << 10)


class Batches:
    """Two batches of rows of different lengths, and what the stock model says to each after a while."""

    def __init__(self, model: Any, steps: int = 5) -> None:
        self.model, self.steps = model, steps
        self.prompts = [tokens(60).view(2, 30), tokens(51, seed=3).view(3, 17)]
        self.new = [tokens(2 * steps, seed=7).view(2, steps), tokens(3 * steps, seed=8).view(3, steps)]
        with torch.no_grad():
            whole = [torch.cat(pair, dim=1) for pair in zip(self.prompts, self.new, strict=True)]
            self.expected = [model(ids).logits[:, -steps:] for ids in whole]

    def caches(self, handle: Any) -> list[Any]:
        made = [handle.new_cache(max_length=40) for _ in self.prompts]
        for cache, prompt in zip(made, self.prompts, strict=True):
            self.model(prompt, past_key_values=cache)
        return made

    def check(self, column: Column, first: int = 0) -> None:
        for step in range(first, self.steps):
            logits = column.step([ids[:, step : step + 1] for ids in self.new])
            for ours, expected in zip(logits, self.expected, strict=True):
                assert_close(ours[:, 0], expected[:, step])


def late() -> Lanes:
    return Lanes(LateLane(), LateLane(), EagerCompute())


@pytest.mark.parametrize("lanes", [None, late], ids=["at once", "late"])
@pytest.mark.parametrize("schedule", ["pipelined", "serial"])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["opt", "llama_mha", "qwen3", "phi3"])
def test_every_batch_gets_its_logits(tiny_model: Any, kind: str, share: float, schedule: str, lanes: Any) -> None:
    model = tiny_model(kind)
    batches = Batches(model)
    where = deltakv.Host(**HOST, recompute=share, schedule=schedule)
    with torch.no_grad(), deltakv.apply(model, deltakv.Full(), kv_device=where, fuse=False) as handle:
        column = Column(handle, batches.caches(handle), lanes() if lanes else None)
        batches.check(column)


def test_another_share_on_the_same_caches_and_weights_back(tiny_model: Any) -> None:
    model = tiny_model("opt")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    batches = Batches(model)
    where = deltakv.Host(**HOST, recompute=0.6)
    with torch.no_grad(), deltakv.apply(model, deltakv.Full(), kv_device=where, fuse=False) as handle:
        column = Column(handle, batches.caches(handle), late())
        places = {weight.data_ptr() for layer in model.get_decoder().layers for weight in layer.parameters()}
        assert len(places) == 2 * len(list(model.get_decoder().layers[0].parameters())), "two layers have room"
        for share, schedule in ((0.0, "pipelined"), (0.6, "serial"), (0.6, "pipelined")):
            for cache in column.caches:
                cache.host_rows.change(deltakv.Host(**HOST, schedule=schedule), FixedShare(share, Schedule(schedule)))
            column.share_chunks()
            batches.check(column)
            for cache in column.caches:
                cache.crop(-batches.steps)
        column.remove()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    with torch.no_grad():
        assert_close(model(torch.cat([batches.prompts[0], batches.new[0]], dim=1)).logits[:, -5:], batches.expected[0])


def test_the_model_itself_is_refused_until_its_weights_are_back(tiny_model: Any) -> None:
    model = tiny_model("opt")
    batches = Batches(model)
    with torch.no_grad(), deltakv.apply(model, deltakv.Full(), kv_device="host", fuse=False) as handle:
        with Column(handle, batches.caches(handle)) as column:
            with pytest.raises(deltakv.UnsupportedUseError, match=r"remove\(\) first"):
                model(batches.prompts[0])
            batches.check(column)
        column.remove()  # once more, which changes nothing
        assert_close(model(torch.cat([batches.prompts[0], batches.new[0]], dim=1)).logits[:, -5:], batches.expected[0])


@pytest.mark.parametrize("slabs", [0, 20, 40])
def test_host_memory_that_is_refused_leaves_the_layers_their_weights(tiny_model: Any, slabs: int) -> None:
    model = tiny_model("llama_mha")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    batches = Batches(model)
    with torch.no_grad(), deltakv.apply(model, deltakv.Full(), kv_device="host", fuse=False) as handle:
        caches = batches.caches(handle)
        with refusing(slabs), pytest.raises(deltakv.OffloadError, match="so a test wants it"):
            Column(handle, caches)
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name]), name
        batches.check(Column(handle, caches))


@pytest.mark.parametrize("at", [1, 30, 200])
def test_a_copy_that_fails_changes_nothing(tiny_model: Any, at: int) -> None:
    model = tiny_model("llama_mha")
    batches = Batches(model)
    failing = FailingLane(10**9)
    with (
        torch.no_grad(),
        deltakv.apply(model, deltakv.Full(), kv_device=deltakv.Host(**HOST, recompute=0.5), fuse=False) as handle,
    ):
        column = Column(handle, batches.caches(handle), Lanes(failing, LateLane(), EagerCompute()))
        failing.left = at
        with pytest.raises(deltakv.OffloadError, match="bus is on fire"):
            batches.check(column)
        done = column.caches[0].get_seq_length() - 30
        assert [cache.get_seq_length() for cache in column.caches] == [30 + done, 17 + done]
        batches.check(column, done)


class TestRefused:
    def test_another_model(self, tiny_model: Any) -> None:
        model = tiny_model("gemma3")
        with (
            deltakv.apply(model, deltakv.Full(), kv_device="host", fuse=False) as handle,
            pytest.raises(deltakv.UnsupportedUseError, match=r"column by column are covered for .* not for 'gemma3"),
        ):
            Column(handle, [])

    @pytest.mark.parametrize("options", [{"kv_device": "device"}, {"kv_device": "host", "fuse": True}], ids=str)
    def test_weights_that_must_stay(self, tiny_model: Any, options: dict[str, Any]) -> None:
        with (
            deltakv.apply(tiny_model("opt"), deltakv.Full(), **options) as handle,
            pytest.raises(deltakv.UnsupportedUseError, match="fuse=False"),
        ):
            Column(handle, [])
