"""K and V in host memory on a real GPU: streams that run late, page-locked memory, and memory that stays flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from deltakv.offload import lanes

pytestmark = pytest.mark.gpu

KINDS = ("opt", "llama_mha", "qwen2", "qwen3", "phi3")
SMALL: dict[str, Any] = {"chunk_mib": 16 / 1024, "chunks": 3}


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """fp32 products in fp32: TF32 would hide a wrong result behind its rounding."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["as it comes", "late copies", "late to the host"])
def timing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Copies behind a sleep on their own stream, all or those to the host: whoever does not wait for them reads what
    was there before."""
    if request.param != "as it comes":
        copy = lanes.StreamLane.copy

        def late(self: Any, target: Tensor, source: Tensor) -> None:
            if self._own is not None and (request.param == "late copies" or not target.is_cuda):
                with torch.cuda.stream(self._own):
                    torch.cuda._sleep(500_000)
            copy(self, target, source)

        monkeypatch.setattr(lanes.StreamLane, "copy", late)
    return request.param


def batch_of(*lengths: int) -> dict[str, Tensor]:
    generator, width = torch.Generator().manual_seed(0), max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 128, (len(lengths), width), generator=generator) * mask
    return {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda()}


def greedy(model: Any, batch: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    model.generation_config.eos_token_id = None
    out = model.generate(
        **batch, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    return out.sequences.cpu(), torch.stack(out.logits).float().cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"recompute": 0.6}, {"recompute": 0.6, "schedule": "serial"}, {"recompute": 0.6, "overlap": False},
        {"recompute": 0}, {"recompute": 1.0, "pinned": False},
    ],
    ids=str,
)  # fmt: skip
def test_generation_equals_stock(tiny_model: Any, timing: str, kind: str, options: dict[str, Any]) -> None:
    model, batch = tiny_model(kind).cuda(), batch_of(120, 43, 77)
    tokens, logits = greedy(model, batch, 20)
    with deltakv.apply(model, deltakv.Full(), kv_device=deltakv.Host(**SMALL, **options)):
        ours_tokens, ours_logits = greedy(model, batch, 20)
    torch.testing.assert_close(ours_logits, logits, atol=1e-4, rtol=0)
    assert torch.equal(ours_tokens, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_no_further_from_the_truth(tiny_model: Any, kind: str, dtype: torch.dtype) -> None:
    """At most 1.5x the error of the on-device cache, over the same teacher-forced tokens."""
    model, row = tiny_model(kind).cuda().to(dtype), batch_of(300)["input_ids"]

    def logits(where: Any) -> Tensor:
        with torch.no_grad(), deltakv.apply(model, deltakv.Full(), kv_device=where):
            cache = model(row[:, :260]).past_key_values
            return torch.cat([model(row[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(260, 300)])

    found = [logits(where).float() for where in ("device", deltakv.Host(**SMALL, recompute=0.6))]
    with torch.no_grad():
        exact = model.float()(row).logits[0, 260:]
    device, host = ((one - exact).square().mean().sqrt() for one in found)
    assert 0 < host <= 1.5 * device


def test_the_scheduler_measures_once(tiny_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path))
    model, batch = tiny_model("opt").cuda(), batch_of(60, 30)
    stock = greedy(model, batch, 8)
    for _ in range(2):
        with deltakv.apply(model, deltakv.Full(), kv_device="host") as handle:
            assert torch.equal(greedy(model, batch, 8)[0], stock[0])
            assert not handle.offload.reason
    assert len(list((tmp_path / "offload").iterdir())) == 1


def test_host_memory_is_page_locked(tiny_model: Any) -> None:
    model = tiny_model("opt").cuda()
    with torch.no_grad(), deltakv.apply(model, deltakv.Full(), kv_device=deltakv.Host(recompute=0.5)):
        cache = model(batch_of(50)["input_ids"]).past_key_values
        assert all(part.is_pinned() for part in cache.host_rows._layers[0].kv.parts(0, 50))


def test_device_memory_is_flat(tiny_model: Any) -> None:
    """A decode step takes as much from 250 tokens as from 4,000, but for OPT's own mask and positions."""
    model, peaks = tiny_model("opt").cuda(), []
    with (
        torch.no_grad(),
        deltakv.apply(model, deltakv.Full(), kv_device=deltakv.Host(**SMALL, recompute=0.5)) as handle,
    ):
        for length in (250, 4000):
            cache = handle.new_cache(max_length=length + 2)
            for chunk in batch_of(length, length)["input_ids"].split(125, dim=1):
                model(chunk, past_key_values=cache, logits_to_keep=1)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(chunk[:, :1], past_key_values=cache)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    own = 2 * 4000 * 3 * 8  # rows, tokens, three integers each; their K and V of one layer would be ten times that
    assert peaks[1] <= 1.02 * peaks[0] + own


@pytest.mark.parametrize("kind", ["opt", "llama_mha", "qwen2"])
@pytest.mark.parametrize("schedule", ["pipelined", "serial"])
def test_the_host_waits_for_nothing_in_a_decode_step(tiny_model: Any, kind: str, schedule: str) -> None:
    """Of rows of one length: it runs ahead, and the bus always has the next piece."""
    from deltakv.bench.clock import no_syncs

    model, ids = tiny_model(kind).cuda(), batch_of(300, 300)["input_ids"]
    options = {**SMALL, "recompute": 0.6, "schedule": schedule}
    with torch.no_grad(), deltakv.apply(model, deltakv.Full(), kv_device=deltakv.Host(**options)) as handle:
        cache = handle.new_cache(max_length=310)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # what is compiled or taken once
        with no_syncs(torch.device("cuda")):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind", ["opt", "llama_mha"])
@pytest.mark.parametrize("schedule", ["pipelined", "serial"])
def test_batches_column_by_column(tiny_model: Any, timing: str, kind: str, schedule: str) -> None:
    """Weights in host memory, two layers at a time on the device: every batch gets the stock model's logits."""
    from deltakv.integrations.hf.column import Column

    model, steps = tiny_model(kind).cuda(), 6
    prompts = [batch_of(90, 90)["input_ids"], batch_of(40, 40, 40)["input_ids"]]
    with torch.no_grad():
        whole = [torch.cat([ids, ids[:, :steps]], dim=1) for ids in prompts]
        expected = [model(ids).logits[:, -steps:] for ids in whole]
        where = deltakv.Host(**SMALL, recompute=0.6, schedule=schedule)
        with deltakv.apply(model, deltakv.Full(), kv_device=where, fuse=False) as handle:
            caches = [handle.new_cache(max_length=100) for _ in prompts]
            for cache, ids in zip(caches, prompts, strict=True):
                model(ids, past_key_values=cache)
            column = Column(handle, caches)
            for step in range(steps):
                logits = column.step([ids[:, step : step + 1] for ids in prompts])
                for ours, stock in zip(logits, expected, strict=True):
                    torch.testing.assert_close(ours[:, 0], stock[:, step], atol=1e-4, rtol=0)
            column.remove()
        torch.testing.assert_close(model(whole[0]).logits[:, -steps:], expected[0], atol=1e-4, rtol=0)


def test_what_is_page_locked_ahead_is_what_the_cache_takes(tiny_model: Any) -> None:
    """Nothing more is page-locked for it, and what is given back goes to the system when that is asked for."""
    from deltakv.offload import memory
    from deltakv.offload.ahead import page_lock

    memory.empty_pool()
    held = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    page_lock(16 * memory.SLAB_BYTES)
    ahead = torch.cuda.host_memory_stats()["allocated_bytes.current"] - held
    assert ahead == 16 * memory.SLAB_BYTES == memory.pooled_bytes()
    records = memory.Records(memory.HostMemory(pinned=True), 1, 1 << 20)
    records.ensure((16 * memory.SLAB_BYTES >> 20) - 6)  # slabs of that size from the first on
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] - held == ahead
    records.release()
    memory.empty_pool()
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] <= held


def test_host_memory_does_not_grow(tiny_model: Any) -> None:
    """Mixed requests, one after the other: what torch holds of page-locked memory settles."""
    model, held = tiny_model("opt").cuda(), []
    with deltakv.apply(model, deltakv.Full(), kv_device=deltakv.Host(**SMALL, recompute=0.5)):
        for round_ in range(6):
            for lengths in ((200, 30), (77,), (500, 400, 300), (10,)):
                greedy(model, batch_of(*lengths), 6)
            if round_ >= 1:
                held.append(torch.cuda.host_memory_stats()["allocated_bytes.current"])
    assert max(held) <= held[0]
