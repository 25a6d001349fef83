"""`deltakv bench offload` on tiny dimensions: every variant runs, moves what it says, and has a prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, refused

from deltakv.bench.dims import find_config, make_model
from deltakv.bench.offload import VARIANTS
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
    assert tuple(found) == VARIANTS
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
    from deltakv.integrations.hf.shapes import layer_shape
    from deltakv.offload.config import Host

    config = find_config("tiny")
    model, seen = make_model(config, torch.float32, torch.device("cpu")), []
    with torch.no_grad():
        for parameter in model.parameters():  # drawn small, every token would be followed by the same one
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    step = OffloadBench._step

    def noting(self: Any, cache: Any, token: torch.Tensor) -> Any:
        result = step(self, cache, token)
        seen.append(result[0][:, 0].tolist())
        return result

    monkeypatch.setattr(OffloadBench, "_step", noting)
    base = Host(recompute=0.6, chunk_mib=0.02)
    bench = OffloadBench(model, layer_shape(config, torch.float32), measure_model(model), base, 3, 50, 4)
    assert len(bench.run(VARIANTS)) == len(VARIANTS)
    each = [seen[start : start + 6] for start in range(0, len(seen), 6)]
    assert len(each) == len(VARIANTS) and all(tokens == each[0] for tokens in each)
    assert len({token for tokens in each[0] for token in tokens}) > 5


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
