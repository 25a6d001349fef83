"""Decode steps as one CUDA graph: run on the device machine (`pytest -m gpu`), never in CI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import deltakv
from deltakv.bench.clock import no_syncs
from deltakv.bench.random_model import fill_paged
from deltakv.bench.step import Settings, contender
from hf.harness import left_padded, tokens

pytestmark = pytest.mark.gpu

#: Models whose layers have no window: theirs are the steps that are captured.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "opt")
SPARSE = deltakv.Delta(budget=64, recent=16, sinks=16, min_context=100)
#: Rows below `min_context`, rows that cross it while they decode, and rows beyond it.
RAGGED = (20, 90, 97, 150, 300)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """fp32 products in fp32, and no code of an earlier test."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.compiler.reset()
    counters.clear()
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def batch_of(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = left_padded([tokens(length, seed * 100 + index) for index, length in enumerate(lengths)])
    return {name: tensor.cuda() for name, tensor in batch.items()}


def greedy(model: Any, batch: dict[str, torch.Tensor], count: int, **options: Any) -> tuple[Any, torch.Tensor]:
    out = model.generate(
        **batch, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits).float()


def launches(run: Any) -> dict[str, int]:
    """How often the host launched what, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return {event.key: event.count for event in profiler.key_averages() if event.key.startswith(("cuda", "cuLaunch"))}


@pytest.mark.parametrize("kind", KINDS)
def test_generate_captures_one_graph(tiny_model: Any, kind: str) -> None:
    """Ragged rows, rows that cross `min_context`, rows that end, a second prompt: one graph, and eager's output."""
    model = tiny_model(kind).cuda()
    model.generation_config.eos_token_id = None
    with deltakv.apply(model, SPARSE):
        eager, eager_logits = greedy(model, batch_of(*RAGGED), 24, disable_compile=True)
    end = int(eager[1, 300 + 6])
    with deltakv.apply(model, SPARSE) as handle:
        ours, logits = greedy(model, batch_of(*RAGGED), 24)
        assert torch.equal(ours, eager)
        torch.testing.assert_close(logits, eager_logits, atol=1e-3, rtol=0)
        assert handle.stats.sparse_rows > 0
        greedy(model, batch_of(*RAGGED, seed=1), 30)
        ended, _ = greedy(model, batch_of(*RAGGED), 24, eos_token_id=end)
    alive = (ended[:, 300:] != 0).all(1)
    assert not alive[1]
    assert torch.equal(ended[alive], eager[alive])
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_one_launch_and_waits_for_nothing(tiny_model: Any, dtype: torch.dtype) -> None:
    model = tiny_model("qwen2").to("cuda", dtype)
    settings = Settings(runs=20, warmup=5, compiled=True)
    with contender(model, "delta", SPARSE, len(RAGGED), 400, compiled=True) as one, torch.no_grad():
        one.measure(RAGGED, settings)  # its timed runs must not wait, or it raises
        token = torch.ones((len(RAGGED), 1), dtype=torch.long, device="cuda")
        with no_syncs(model.device):
            one.step(token, None)
        found = launches(lambda: one.step(token, None))
    assert found.pop("cudaGraphLaunch") == 1
    assert sum(count for name, count in found.items() if "Launch" in name) <= 2, found  # the tokens' copy


def test_the_forward_alone_waits_for_nothing(tiny_model: Any) -> None:
    """Uncompiled, where a look at a value would show: announcing, the forward, and what `generate` asks of it."""
    model = tiny_model("llama").cuda()
    with torch.no_grad(), deltakv.apply(model, SPARSE) as handle:
        cache = handle.new_cache(400)
        fill_paged(cache, model, RAGGED)
        token = torch.ones((len(RAGGED), 1), dtype=torch.long, device="cuda")
        handle.announce(cache)
        model(token, past_key_values=cache)
        finished = torch.zeros(len(RAGGED), dtype=torch.bool, device="cuda")
        with no_syncs(model.device):
            for _ in range(20):
                handle.announce(cache, finished)
                model(token, past_key_values=cache)
        assert handle.stats.steps == 21


def test_prompts_make_no_dense_mask(tiny_model: Any) -> None:
    """A prefill's mask of [batch, 1, width, width] would be larger than all else that this model needs."""
    model = tiny_model("llama").cuda()
    model.generation_config.eos_token_id = None
    batch = batch_of(12000, 100, 9000, 6000)
    mask_bytes = 4 * 12000 * 12000
    with deltakv.apply(model, SPARSE):
        greedy(model, batch, 2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        greedy(model, batch, 2)
    assert torch.cuda.max_memory_allocated() - before < mask_bytes


def test_graphs_of_long_runs_stay_right(tiny_model: Any) -> None:
    """A few hundred replays, each against the step before it, uncompiled, from the same cache."""
    model = tiny_model("qwen3").cuda()
    model.generation_config.eos_token_id = None
    with deltakv.apply(model, SPARSE):
        eager, eager_logits = greedy(model, batch_of(*RAGGED), 300, disable_compile=True)
        ours, logits = greedy(model, batch_of(*RAGGED), 300)
    assert torch.equal(ours, eager)
    torch.testing.assert_close(logits, eager_logits, atol=1e-3, rtol=0)
