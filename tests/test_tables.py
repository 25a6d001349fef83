"""README tables say what the stored results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["tables.py", "quality_tables.py"])
def test_tables_are_generated_from_results(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| delta |" in (ROOT / "README.md").read_text(encoding="utf-8")
