"""README tables say what the stored results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import vllm_tables

ROOT = Path(__file__).parents[1]


def test_tables_are_generated_from_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| delta |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_of_serving_say_what_was_measured() -> None:
    """One row a size, with ratios the right way up; contenders that were left out are no table."""
    facts = {
        "date": "2026-11-26T00:00:00+00:00", "device": "NVIDIA H200", "dtype": "bfloat16", "commit": "0123456789abc",
        "versions": {"vllm": "0.26.0", "torch": "2.11.0"}, "machine": {"gpus": ["NVIDIA H200"] * 2},
    }  # fmt: skip
    times = {"stock": (100.0, 8.0), "delta": (101.0, 4.0), "local": (101.0, 3.2)}
    engine = {
        name: {"shapes": [{"rows": 64, "context": 16000, "tpot_ms": step, "ttft_one_prompt_ms": first}]}
        for name, (first, step) in times.items()
    }
    served = [
        {"contender": name, "shapes": [{"rows": 64, "context": 1000, "ttft_ms": a, "tpot_ms": b, "tpot_whole_ms": b}]}
        for name, (a, b) in times.items()
    ]
    median = {"contexts": [6000], "median": [0.0125]}
    pair = {"7b": {f"{name}-2": result for name, result in engine.items()}, "equal": {"stock": median, "delta": median}}
    text = vllm_tables.serving(
        [("one", {**facts, "parts": {"1.5b": engine, "7b": {"stock": engine["stock"]}}})],
        [("two", {**facts, "model": "qwen2-7b", "together": True, "results": served})],
        [("three", {**facts, "parts": pair})],
    )
    assert "| Qwen2 1.5b | 64 x 16,000 | 8.00 |  | 4.00 | 2.00x | +1.0% |" in text and "| Qwen2 7b |" not in text
    assert "| 64 x 1,000 | 100.0 | 101.0 | +1.0% | 8.00 | 4.00 | 2.00x | 8.00 | 4.00 | 2.00x |" in text
    assert "| 64 x 16,000 | 8.00 | 4.00 | 3.20 | 2.00x | +25.0% |" in text
    assert "| 6,000 | 0.0125 | 0.0125 |" in text
    assert text.count("<sub>2026-11-26, 2 x H200, bfloat16, vLLM 0.26.0, torch 2.11.0, commit 012345678</sub>") == 3
