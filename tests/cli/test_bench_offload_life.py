"""`deltakv bench offload-memory` and `offload-mixed` on tiny dimensions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, refused


def test_memory_as_rows_grow(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    result = run(
        "bench", "offload-memory", "--model", "tiny", "--context", "20,50,90", "--batch", "3", "--columns", "16",
        "--recompute", "0.5", "--chunk-mib", "0.02", "--json", str(out),
    )  # fmt: skip
    assert result.code == 0, result.err
    data = json.loads(out.read_text())
    assert data["bench"] == "offload-memory" and data["command"] and data["device"] == "CPU"
    assert [found["length"] for found in data["results"]] == [20, 50, 90]
    # Eight chunks to read from and two to write through, whatever the length.
    assert {found["chunk_bytes"] for found in data["results"]} == {10 * int(0.02 * 2**20)}
    taken = [found["host_bytes"] for found in data["results"]]
    assert taken == sorted(taken) and taken[0] >= 3 * 4 * 20 * 512


def test_mixed_requests(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "mixed.json"
    words = ("bench", "offload-mixed", "--model", "tiny", "--layers", "2", "--short", "--minutes", "0")
    result = run(*words, "--chunk-mib", "0.02", "--json", str(out))
    assert result.code == 0, result.err
    data = json.loads(out.read_text())
    rounds, new = data["results"], sum(rows * new for rows, _, new in data["requests"])
    assert [found["requests"] for found in rounds] == [8, 16]
    assert [found["tokens"] for found in rounds] == [new, 2 * new]
    assert all(found["rss"] > 10**7 for found in rounds) and rounds[0]["seconds"] < rounds[1]["seconds"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("offload-memory", "--context", "50,20"), "must ascend"),
        (("offload-memory", "--recompute", "2"), "recompute=2.0"),
        (("offload-mixed", "--chunks", "1"), "chunks=1"),
        (("offload-mixed", "--dtype", "int8"), "dtype 'int8'"),
    ],
    ids=str,
)
def test_refused(run: Run, words: tuple[str, ...], said: str) -> None:
    refused(run("bench", *words, "--model", "tiny"), said)
