"""Small questions in GSM8K's form, for the tests of `deltakv eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

SPARSE = "delta:budget=64,recent=16,sinks=16,min_context=0,plan=FSRRSR"
#: As many pages as there are: the answers are full attention's.
COVERS = "delta:budget=1024,recent=16,min_context=0,plan=FSRRSR"
H2O = "h2o:budget=64,recent=32,lag=4"


def write_questions(path: Path, count: int, ask: Callable[[int], str] = lambda n: f"{n} and {n % 7}?") -> str:
    """A JSONL of `count` sums; questions of different lengths."""
    rows = [{"question": ask(n) + " Add." * (n % 5), "answer": f"It is so.\n#### {n + n % 7}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
