"""`deltakv bench offload` on tiny dimensions: every variant runs, moves what it says, and has a prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, refused

from deltakv.bench.dims import find_config, make_model
from deltakv.bench.offload import DEFAULT
from deltakv.offload import profiler

TINY = (
    "bench",
    "offload",
    "--model",
    "tiny",
    "--context",
    "60",
    "--batch",
    "3",
    "--num-iters",
    "2",
    "--chunk-mib",
    "0.02",
)


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler.measure, "__kwdefaults__", {"copies": (64, 4096), "tokens": (8, 64), "rows": (1, 4)})
    monkeypatch.setattr(profiler, "RUNS", 1)


def test_all_variants(run: Run, tmp_path: Path) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run(*TINY, "--recompute", "0.5", "--json", str(out), "--plot", str(picture))
    assert result.code == 0, result.err
    data = json.loads(out.read_text())
    assert data["command"] and data["machine"] and data["measured_on"] in result.out
    found = {entry["variant"]: entry for entry in data["results"]}
    assert tuple(found) == DEFAULT
    for entry in found.values():
        assert len(entry["all_step_seconds"]) == 2 and entry["step_seconds"] > 0 and not entry["failed"]
    # 3 rows, 4 layers, 60 tokens; K and V are 512 bytes, X and its position 272.
    moved = {name: entry["moved_bytes"] for name, entry in found.items()}
    assert moved == {
        "device": 0, "transformers": 0, "naive": 12 * 60 * 512, "overlapped": 12 * 60 * 512,
        "serial": 12 * 30 * (512 + 272), "pipelined": 12 * 30 * (512 + 272),
    }  # fmt: skip
    for name in ("naive", "overlapped", "serial", "pipelined"):
        assert found[name]["predicted_seconds"] > 0
        assert found[name]["forecast"]["recomputed_tokens"] == (0 if name in ("naive", "overlapped") else 30)
    assert picture.stat().st_size > 10_000


def test_the_decoded_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fast must be right: the variants feed back their own tokens."""
    import torch

    from deltakv.bench.offload import OffloadBench
    from deltakv.integrations.hf.profiling import measure_model
    from deltakv.offload.config import Host

    config = find_config("tiny")
    model, seen = make_model(config, torch.float32, torch.device("cpu")), []
    with torch.no_grad():
        for parameter in model.parameters():  # drawn small, every token would be followed by the same one
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    step = OffloadBench._step

    def noting(self: Any, cache: Any, token: list[torch.Tensor]) -> None:
        step(self, cache, token)
        seen.append(token[0][:, 0].tolist())

    monkeypatch.setattr(OffloadBench, "_step", noting)
    base = Host(recompute=0.6, chunk_mib=0.02)
    bench = OffloadBench(model, measure_model(model), base, 3, 50, 4)
    assert len(bench.run(DEFAULT)) == len(DEFAULT)
    each = [seen[start : start + 6] for start in range(0, len(seen), 6)]
    assert len(each) == len(DEFAULT) and all(tokens == each[0] for tokens in each)
    assert len({token for tokens in each[0] for token in tokens}) > 5


def test_quantised_variants_have_caches_of_their_own(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    chosen = [word for name in ("overlapped", "int8", "int4") for word in ("--variant", name)]
    assert run(*TINY, *chosen, "--json", str(out)).code == 0
    found = {entry["variant"]: entry for entry in json.loads(out.read_text())["results"]}
    # K and V of a token: 128 numbers, and 8 groups of a head's 16 with a scale and a least value of 4 bytes each.
    tokens = 12 * 60
    assert {name: entry["moved_bytes"] // tokens for name, entry in found.items()} == {
        "overlapped": 512, "int8": 128 + 64, "int4": 64 + 64,
    }  # fmt: skip
    assert found["int8"]["host_bytes"] > 0


def test_column_by_column(run: Run, tmp_path: Path) -> None:
    """Weights cross once a step, K, V and X for each batch."""
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run(*TINY, "--batches", "2", "--recompute", "0.5", "--json", str(out), "--plot", str(picture))
    assert result.code == 0, result.err
    data = json.loads(out.read_text())
    found = {entry["variant"]: entry for entry in data["results"]}
    assert list(found) == ["overlapped", "serial", "pipelined"] and data["batches"] == 2
    weights = 4 * (4 * (4 * 64 * 64 + 2 * 64 * 256 + 5 * 64 + 256 + 4 * 64))
    for name, entry in found.items():
        moved = 2 * 12 * (60 * 512 if name == "overlapped" else 30 * (512 + 272))
        assert moved + weights <= entry["moved_bytes"] <= moved + weights + 4 * 16 * 256
        assert entry["predicted_seconds"] > 0 and len(entry["all_step_seconds"]) == 2
    assert picture.stat().st_size > 10_000


def test_a_variant_that_does_not_fit_is_a_result(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    """And what was measured before and after it is kept."""
    import torch

    from deltakv.bench.offload import OffloadBench

    def full(self: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(OffloadBench, "_device", full)
    out = tmp_path / "bench.json"
    chosen = [word for name in ("overlapped", "device", "transformers") for word in ("--variant", name)]
    result = run(*TINY, *chosen, "--json", str(out))
    assert result.code == 0 and "does not fit" in result.out
    found = {entry["variant"]: entry for entry in json.loads(out.read_text())["results"]}
    assert found["device"]["failed"] == "does not fit: CUDA out of memory" and not found["device"]["step_seconds"]
    assert found["overlapped"]["step_seconds"] and found["transformers"]["step_seconds"]


def test_what_a_profiler_saw() -> None:
    """The GPU is busy in kernels, at once or one by one, and not in copies."""
    import torch

    from deltakv.bench.offload_steps import Clock

    events = [
        ("Memcpy HtoD (Pinned -> Device)", 10.0, 10.4), ("gemm", 10.2, 10.3), ("add", 10.25, 10.35),
        ("Memcpy DtoH (Device -> Pinned)", 10.4, 10.9), ("gemm", 10.6, 10.7), ("Memset (Device)", 10.7, 11.0),
    ]  # fmt: skip
    busy, seen = Clock(torch.device("cpu"), 2)._read(events, 1.0)
    assert busy == pytest.approx(0.25)
    assert [(s.lane, s.what, s.layer) for s in seen.spans] == [
        ("bus", "moved", 0), ("GPU", "kernels", 0), ("GPU", "kernels", 1),
    ]  # fmt: skip
    assert seen.spans[-1].start == pytest.approx(0.6) and seen.seconds == pytest.approx(0.7)


def test_chosen_variants_and_fewer_layers(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    chosen = ("--variant", "pipelined", "--variant", "overlapped")
    assert run(*TINY, *chosen, "--layers", "2", "--bits", "8", "--json", str(out)).code == 0
    data = json.loads(out.read_text())
    assert [entry["variant"] for entry in data["results"]] == ["overlapped", "pipelined"]
    assert (data["layers"], data["bits"]) == (2, 8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "./gpt-5"), "one of the dimensions"),
        (("--variant", "flexgen"), "unknown variant 'flexgen'"),
        (("--recompute", "most"), "recompute='most'"),
        (("--bits", "2"), "bits=2"),
        (("--chunks", "1"), "chunks=1"),
        (("--batches", "2", "--variant", "device"), "unknown variant 'device'; allowed are overlapped"),
        (("--dtype", "int8"), "dtype 'int8'"),
        (("--plot", "a.txt"), "a.txt"),
    ],
    ids=str,
)
def test_refused(run: Run, words: tuple[str, ...], said: str) -> None:
    refused(run(*TINY, *words), said)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("opt-6.7b", (4096, 32, 4096)), ("opt-13b", (5120, 40, 5120)), ("llama-2-7b", (4096, 32, 4096)),
        ("qwen2.5-7b", (3584, 28, 512)), ("tiny", (64, 4, 64)),
    ],
)  # fmt: skip
def test_dimensions_are_those_of_the_models(name: str, known: tuple[int, int, int]) -> None:
    """Hidden size, layers and KV width, as their configs on the Hub have them."""
    config = find_config(name)
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = kv_heads * config.hidden_size // config.num_attention_heads
    assert (config.hidden_size, config.num_hidden_layers, width) == known
