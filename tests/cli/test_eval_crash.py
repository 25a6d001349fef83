"""`eval` killed ten times at random moments ends as an undisturbed run does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crashes import killed
from eval_data import H2O, SPARSE, write_questions


def lasting(folder: Path) -> dict[str, Any]:
    """What a run leaves behind, but for when and how fast."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for entry in results["results"]:
        for name in ("seconds", "made", "kv_bytes"):
            entry.pop(name)
    journals = {}
    for path in sorted((folder / "answers").glob("*.jsonl")):
        batches = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        for batch in batches:
            batch.pop("seconds")
        assert len({batch["batch"] for batch in batches}) == len(batches), "nothing is answered twice"
        journals[path.name] = sorted(batches, key=lambda batch: batch["batch"])
    told = {name: results[name] for name in ("task", "settings", "fingerprint", "results")}
    return {"results": told, "journals": journals, "questions": (folder / "questions.jsonl").read_bytes()}


def test_killed_ten_times(model_folder: str, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data.jsonl", 16)
    words = ["eval", "--task", "gsm8k", "--data", data, "--model", model_folder, "-n", "16", "--batch", "2"]
    words += ["--temperature", "0.8", "--shots", "5", "--no-chat", "--threads", "1"]
    words += ["--method", "full", "--method", SPARSE, "--method", H2O, "--out", "{}"]
    told = killed(tmp_path, words)
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole"), told
