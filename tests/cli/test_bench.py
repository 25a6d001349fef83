"""`deltakv bench` on a tiny model: what it writes, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, refused

TIMED = {"median_ms", "quartiles_ms", "runs", "bytes", "floor_ms", "share_of_floor"}
QUICK = ("--num-iters", "2", "--num-iters-warmup", "1")


def written(path: Path, bench: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert data["bench"] == bench and data["copy_bandwidth"] > 0
    assert data["versions"]["torch"] and data["command"] and data["dtype"] == "float32"
    return data


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of a copy is not what these tests are about."""
    monkeypatch.setattr("deltakv.bench.clock.COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("deltakv.bench.op._ROUND_BYTES", {"cpu": 1})


def test_step(run: Run, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    result = run(
        "bench", "step", "--model", model_folder, "--batch-size", "3", "--input-len", "300", "--spread", "10",
        "--method", "full", "--method", "delta:budget=64,recent=16,min_context=0", "--method", "stock-static",
        "--loop", "2", "--output-json", str(file), *QUICK,
    )  # fmt: skip
    assert result.code == 0, result.err
    data = written(file, "step")
    assert not data["compiled"]
    full, delta, static = data["results"]
    assert [r["method"] for r in data["results"]] == ["full", "delta:budget=64,recent=16,min_context=0", "stock-static"]
    for entry in data["results"]:
        assert entry.keys() >= TIMED and entry["generate_ms"] is not None
        assert (entry["batch"], entry["context"], entry["tokens"]) == (3, 300, 300 + 165 + 30)
    assert static["bytes"] == full["bytes"] > delta["bytes"]
    assert "of floor" in result.out and "generate ms" in result.out and "30 to 300 tokens" in result.out
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_finished_rows_are_not_waited_for(run: Run, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    words = ("--model", model_folder, "--batch-size", "3", "--input-len", "100", "--method", "full", *QUICK)
    assert run("bench", "step", *words, "--finished", "2", "--json", str(file)).code == 0
    (entry,) = written(file, "step")["results"]
    assert (entry["batch"], entry["finished"], entry["tokens"]) == (3, 2, 100)
    refused(run("bench", "step", *words, "--finished", "3"), "--finished 3", "at most 2")
    refused(run("bench", "step", *words, "--finished", "1", "--loop", "2"), "--loop", "without --finished")
    refused(run("bench", "step", *words, "--spread", "inf"), "--spread inf")
    refused(run("bench", "step", *words, "--profile", "--device", "cpu"), "--profile", "device is cpu")
    assert run("bench", "step", *words, "--spread", "4", "--finished", "1", "--json", str(file)).code == 0
    (entry,) = written(file, "step")["results"]
    assert (entry["context"], entry["tokens"]) == (100, 100 + 63)  # the longest rows go on


def test_short_answers_of_stock(run: Run, model_folder: str) -> None:
    words = ("--model", model_folder, "--batch-size", "1", "--output-len", "3", "--method", "stock-static")
    assert run("bench", "generate", *words).code == 0


@pytest.mark.parametrize("command", ["step", "sweep"])
def test_what_does_not_fit_is_named(
    run: Run, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A contender that runs out of memory takes nothing of what the others have shown with it."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr("deltakv.bench.step.make_static", fail)
    file = tmp_path / "step.json"
    words = ("bench", command, "--model", model_folder, "--batch-size", "1", "--input-len", "64", *QUICK)
    result = run(*words, "--method", "stock-static", "--method", "full", "--json", str(file))
    assert result.code == 0 and "stock-static" in result.err
    data = written(file, command)
    assert [entry["method"] for entry in data["results"]] == ["full"]
    assert len(data["left_out"]) == 1 and data["left_out"][0].startswith("stock-static")
    refused(run(*words, "--method", "stock-static"), "memory", "--batch-size")
    monkeypatch.setattr("deltakv.bench.dims.make_model", fail)
    refused(run(*words, "--method", "full"), "memory", "3 GiB")


def test_op(run: Run, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "op.json"
    result = run(
        "bench", "op", "--model", model_folder, "--batch-size", "2", "--input-len", "200",
        "--method", "delta:budget=64,recent=16,min_context=0", "--json", str(file), *QUICK,
    )  # fmt: skip
    assert result.code == 0, result.err
    by_name = {entry["op"]: entry for entry in written(file, "op")["results"]}
    assert list(by_name) == [
        "attention, FULL", "attention, SELECT", "attention, REUSE", "page scores", "page selection"
    ]  # fmt: skip
    kv, vectors = 2 * 2 * 200 * 2 * 16 * 4, 2 * 2 * 4 * 16 * 4
    assert by_name["attention, FULL"]["bytes"] == by_name["attention, SELECT"]["bytes"] == kv + vectors
    assert by_name["attention, REUSE"]["bytes"] == kv * 56 // 200 + vectors  # 4 pages, the last with 8 tokens
    assert "floor us" in result.out


def test_sweep(run: Run, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    result = run(
        "bench", "sweep", "--model", model_folder, "--batch-size", "1,2", "--input-len", "64,128",
        "--json", str(file), *QUICK,
    )  # fmt: skip
    assert result.code == 0, result.err
    data = written(file, "sweep")
    points = [(entry["method"], entry["batch"], entry["context"]) for entry in data["results"]]
    assert sorted(points) == sorted((m, b, c) for m in ("full", "delta") for b in (1, 2) for c in (64, 128))
    assert {(trend["method"], trend["batch"]) for trend in data["trends"]} == {(m, b) for m, b, _ in points}
    assert "never slower from" in result.out
    assert (tmp_path / "sweep.png").stat().st_size > 5000


def test_generate(run: Run, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "generate.json"
    result = run(
        "bench", "generate", "--model", model_folder, "--batch-size", "2", "--output-len", "12",
        "--method", "full", "--method", "delta", "--method", "stock-static", "--json", str(file),
    )  # fmt: skip
    assert result.code == 0, result.err
    entries = written(file, "generate")["results"]
    assert [entry["method"] for entry in entries] == ["full", "delta", "stock-static"]
    for entry in entries:
        assert (entry["batch"], entry["input_len"], entry["output_len"]) == (2, 4, 12)
        assert entry["tokens_per_s"] == pytest.approx(24 / entry["seconds"])


def test_longer_than_the_model_was_made_for(run: Run, model_folder: str) -> None:
    """Weights are random, so positions may go on; the model's own limit here is 1,024."""
    result = run("bench", "step", "--model", model_folder, "--batch-size", "1", "--input-len", "1500", *QUICK)
    assert result.code == 0, result.err


@pytest.mark.parametrize("command", ["step", "op", "sweep", "generate"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "delat"], ["'delat'", "delta", "full"]),
        (["--method", "delta:plan=FFS"], ["3 layers, but the model has 6"]),
        (["--dtype", "float8"], ["'float8'", "bfloat16"]),
        (["--device", "meta"], ["'meta'"]),
        (["--output-json", "/nowhere/x.json"], ["/nowhere/x.json"]),
    ],
)
def test_refusals(run: Run, command: str, words: list[str], said: list[str], model_folder: str) -> None:
    refused(run("bench", command, "--model", model_folder, *words), *said)


def test_what_has_no_ops_or_is_no_number(run: Run, model_folder: str) -> None:
    refused(run("bench", "op", "--model", model_folder, "--method", "full"), "'full'")
    refused(run("bench", "step", "--model", model_folder, "--method", "h2o"), "'h2o' evicts", "deltakv compare")
    refused(run("bench", "sweep", "--model", model_folder, "--batch-size", "1,many"), "--batch-size", "1,many")
    refused(run("bench", "step", "--model", "nothing-of-the-kind"), "nothing-of-the-kind", "qwen3-8b")
