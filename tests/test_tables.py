"""README tables say what the stored results say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deltakv.bench.offload_life import Flat, Round
from deltakv.bench.offload_steps import Measured
from deltakv.offload.config import Host
from deltakv.offload.forecast import forecast
from offload.made_up import SHAPE, profile

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import vllm_tables

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["tables.py", "quality_tables.py", "measured_plans.py"])
def test_tables_are_generated_from_results(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| delta |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_of_serving_say_what_was_measured() -> None:
    """One row a size, with ratios the right way up; contenders that were left out are no table."""
    facts = {
        "date": "2026-11-26T00:00:00+00:00", "device": "NVIDIA H200", "dtype": "bfloat16", "commit": "0123456789abc",
        "versions": {"vllm": "0.26.0", "torch": "2.11.0"}, "machine": {"gpus": ["NVIDIA H200"] * 2},
    }  # fmt: skip
    times = {"stock": (100.0, 8.0), "delta": (101.0, 4.0)}
    engine = {
        name: {"shapes": [{"rows": 64, "context": 16000, "tpot_ms": step, "ttft_one_prompt_ms": first}]}
        for name, (first, step) in times.items()
    }
    served = [
        {"contender": name, "shapes": [{"rows": 64, "context": 1000, "ttft_ms": a, "tpot_ms": b, "tpot_whole_ms": b}]}
        for name, (a, b) in times.items()
    ]
    median = {"contexts": [6000], "median": [0.0125], "steps": [24]}
    other = {"contexts": [6000], "median": [0.025], "steps": [9]}
    beside = [
        {
            "setup": "two-gpus", "model": "qwen2-7b", "gpus": 2, "what": "step", "rows": 64, "context": 16000,
            "ms": {"local": [3.0, 4.0, 5.0], "delta": [3.3, 4.2, 5.1]}, "more": {"delta": [-0.01, 0.03, 0.125]},
        },
        {
            "setup": "7b", "model": "qwen2-7b", "gpus": 1, "what": "ttft", "rows": 1, "context": 1000,
            "ms": {"stock": [1.0, 2.0, 3.0], "full": [1.0, 2.5, 3.0], "delta": [1.0, 1.5, 3.0]},
            "more": {"full": [0.1, 0.2, 0.3], "delta": [-0.5, -0.25, 0.0]},
        },
    ]  # fmt: skip
    text = vllm_tables.serving(
        [("one", {**facts, "parts": {"1.5b": engine, "7b": {"stock": engine["stock"]}}})],
        [("two", {**facts, "model": "qwen2-7b", "together": True, "results": served})],
        [("three", {**facts, "equal": {"stock": median, "delta": other}})],
        [("four", {**facts, "results": beside})],
    )
    assert "| Qwen2 1.5b | 64 x 16,000 | 8.00 |  | 4.00 | 2.00x | +1.0% |" in text and "| Qwen2 7b | 64 x" not in text
    assert "| 64 x 1,000 | 100.0 | 101.0 | +1.0% | 8.00 | 4.00 | 2.00x | 8.00 | 4.00 | 2.00x |" in text
    assert "| 6,000 | 0.0125 (24) | 0.0250 (9) |" in text
    assert "| Qwen2 7b, 2 GPUs | step | 64 x 16,000 | 4.00 | 4.20 |  |  | +3.0% | -1.0% to +12.5% |" in text
    assert "| Qwen2 7b | first token | 1 x 1,000 |  | 1.50 | 2.00 | 2.50 | -25.0% | -50.0% to +0.0% |" in text
    assert text.count("<sub>2026-11-26, 2 x H200, bfloat16, vLLM 0.26.0, torch 2.11.0, commit 012345678</sub>") == 4


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/tables.py with an empty folder of results."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def store(tables: Any, name: str, **data: Any) -> None:
    head = {
        "date": "2026-01-02T03:04:05", "device": "NVIDIA X9", "dtype": "float16", "copy_bandwidth": 4.2e12, "layers": 3,
        "versions": {"torch": "2.99", "transformers": "5.98"}, "commit": "abcdef123456+changes", "model": "opt-1b",
    }  # fmt: skip
    (tables.HERE / "results" / f"{name}.json").write_text(json.dumps({**head, **data}))


def test_no_run_with_k_and_v_in_host_memory(tables: Any) -> None:
    assert tables.offload().startswith("No run is stored yet")


def test_a_run_of_bench_offload(tables: Any) -> None:
    """Every number of a row comes from the JSON that `bench offload` writes."""
    plain, some = (forecast(SHAPE, profile(), Host(chunk_mib=1), 3, 4, 1000, tokens=tokens) for tokens in (0, 400))
    bytes_ = 3 * 4 * 1000 * SHAPE.kappa
    results = [
        Measured("device", [], failed="does not fit: CUDA out of memory. Tried"),
        Measured("overlapped", [2 * plain.timeline.seconds], plain, bytes_, 0.25, 10, 20),
        Measured("pipelined", [1.1 * some.timeline.seconds] * 3, some, bytes_ // 2, 0.75, 10, 20),
    ]
    store(
        tables, "x9-offload", bench="offload", batch=4, batches=1, context=1000, pin_seconds=2.0, pinned_bytes=5e9,
        results=[result.numbers() for result in results],
    )  # fmt: skip
    assert "**opt-1b, 3 layers, batch 4, 1,000 tokens**\n" in tables.offload()
    (tables.HERE / "results" / "x9-offload.png").touch()
    text = tables.offload()
    assert "**opt-1b, 3 layers, batch 4, 1,000 tokens** ([picture](results/x9-offload.png))" in text
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert lines["device"].startswith("| device | does not fit |")
    overlapped = 2 * plain.timeline.seconds
    assert (
        f"| overlapped | {1e3 * overlapped:,.1f} | 1.00x | {1e3 * plain.timeline.seconds:,.1f} | +100% | 0% |" in text
    )
    ratio = overlapped / (1.1 * some.timeline.seconds)
    assert f" | {ratio:.2f}x | {1e3 * some.timeline.seconds:,.1f} | +10% | 40% | " in lines["pipelined"]
    rate = bytes_ / overlapped
    assert f" | {rate / 1e9:.1f} | {rate / plain.rates.bus:.0%} | 25% |" in lines["overlapped"]
    assert "bus 1.0 GB/s, recomputing" in text and "page-locking 2.5 GB/s" in text
    assert "commit abcdef123 and changes" in text


def test_a_column_s_title_says_so(tables: Any) -> None:
    store(tables, "c", bench="offload", batch=16, batches=4, context=1024, pin_seconds=0, pinned_bytes=0, results=[])
    assert "**opt-1b, 3 layers, 4 batches of 16, weights in host memory, 1,024 tokens**" in tables.offload()


def test_runs_of_memory_and_of_mixed_requests(tables: Any) -> None:
    grown = [Flat(length, 9 << 20, peak, 1, 1 << 30) for length, peak in ((2000, 100 << 20), (32000, 101 << 20))]
    store(
        tables, "m", bench="offload-memory", batch=2, recompute=1.0, results=[flat.numbers() for flat in grown]
    )  # fmt: skip
    rounds = [Round(8 * n, 100 * n, 60.0 * n, (500 + n) << 20, 64 << 20, 7 << 20) for n in range(1, 11)]
    store(tables, "n", bench="offload-mixed", results=[one.numbers() for one in rounds])
    text = tables.offload()
    assert "**opt-1b, 3 layers, batch 2, 100% recomputed**: memory" in text
    assert "| 2,000 | 100.0 | +0.0% | 9.0 | 1,024 |" in text and "| 32,000 | 101.0 | +1.0% | 9.0 | 1,024 |" in text
    assert "80 mixed requests" in text
    assert "| 1.0 | 8 | 501 | 64 | 7 |" in text and "| 10.0 | 80 | 510 | 64 | 7 |" in text
