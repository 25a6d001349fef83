"""`deltakv plan --offload`: a table, a timeline, JSON and a picture from measured rates, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, refused, save_model

from deltakv.offload.profile import Profile, Timing
from deltakv.offload.scheduler import LayerShape


@pytest.fixture(scope="module")
def multi_head(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=257, hidden_size=64, num_attention_heads=4, num_hidden_layers=6, ffn_dim=96, word_embed_proj_dim=64,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return str(save_model(tmp_path_factory.mktemp("opt"), config))


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A bus of 1 GB/s and a GPU of 0.04 TFLOP/s."""
    shape = LayerShape(hidden=64, kv_heads=4, head_dim=16, element_bytes=4)
    copies = (Timing(1_000, 1e-6), Timing(100_000_000, 0.1))
    path = tmp_path / "profile.json"
    Profile(
        machine="a GPU that nobody has", dtype="float32", shape=(64, 4, 16),
        to_device=copies, to_host=copies, to_device_pageable=copies, to_host_pageable=copies,
        recompute=tuple(Timing(n, n * shape.phi / 4e10) for n in (10, 100_000)),
        attention=(Timing(1, 1e-9), Timing(100_000, 1e-6)), rest=(Timing(1, 1e-7), Timing(64, 1e-7)),
    ).save(path)  # fmt: skip
    return path


def test_host_memory_holds_all_batches_and_the_weights(run: Run, profile: Path, tmp_path: Path) -> None:
    """K, V and X of each batch and layer; and the weights of all layers, if several batches share them."""
    data = json.loads(profile.read_text())
    profile.write_text(json.dumps({**data, "shape": [4096, 32, 128]}))
    out = tmp_path / "plan.json"
    for batches in (1, 3):
        result = run(
            "plan", "--offload", "--model", "opt-6.7b", "--context", "1000", "--batch", "8", "--batches", str(batches),
            "--profile", str(profile), "--json", str(out),
        )  # fmt: skip
        assert result.code == 0, result.err
        found = json.loads(out.read_text())["results"][0]
        token = 1000 * 2 * 4096 * 4 + found["recomputed_tokens"] * (4096 * 4 + 16)
        weights = 4 * (4 * 4096 * 4096 + 2 * 4096 * 16384 + 5 * 4096 + 16384 + 4 * 4096) if batches > 1 else 0
        told = next(line for line in result.out.splitlines() if "host memory" in line).split("│")[-2]
        assert float(told.replace(",", "")) == pytest.approx(32 * (8 * batches * token + weights) / 1e9, abs=0.01)


@pytest.mark.parametrize("schedule", ["pipelined", "serial"])
def test_multi_head(run: Run, multi_head: str, profile: Path, tmp_path: Path, schedule: str) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    result = run(
        "plan", "--offload", "--model", multi_head, "--context", "1000,4000", "--batch", "8", "--schedule", schedule,
        "--chunk-mib", "0.25", "--profile", str(profile), "--json", str(out), "--plot", str(picture),
    )  # fmt: skip
    assert result.code == 0, result.err
    data = json.loads(out.read_text())
    assert [r["length"] for r in data["results"]] == [1000, 4000]
    for found in data["results"]:
        assert 0 < found["recomputed_tokens"] <= found["length"] and found["reason"] == ""
        assert found["layer_speedup"] > 1.2
        assert found["step_seconds"] == pytest.approx(6 * found["layer_seconds"]["total"], rel=0.3)
        assert found["rates"]["bus"] == pytest.approx(1e9, rel=0.01)
        assert f"{found['recomputed_tokens']:,} ({found['share']:.0%})" in result.out
    gemm = f"{data['results'][-1]['rates']['gemm'] / 1e12:,.3g}"
    assert f"a GPU that nobody has: bus 1.0 GB/s, recomputing {gemm} TFLOP/s" in result.out
    bus, gpu = (next(line for line in result.out.splitlines() if line.startswith(lane)) for lane in ("bus ", "GPU "))
    assert "X" in bus and "=" in bus and "R" in gpu
    assert picture.stat().st_size > 10_000


def test_grouped_query_attention_says_why(run: Run, model_folder: str, profile: Path, tmp_path: Path) -> None:
    changed = json.loads(profile.read_text())
    changed["shape"] = [64, 2, 16]
    profile.write_text(json.dumps(changed))
    result = run("plan", "--offload", "--model", model_folder, "--context", "500", "--profile", str(profile))
    assert result.code == 0, result.err
    assert "nothing is recomputed at 500 tokens: grouped-query attention" in result.out
    assert "R" not in next(line for line in result.out.splitlines() if line.startswith("GPU "))


def test_dimensions_by_name(run: Run, profile: Path) -> None:
    """Those that `bench offload` knows: nothing is loaded, and nobody is asked for a model of that name."""
    changed = json.loads(profile.read_text())
    profile.write_text(json.dumps({**changed, "shape": [4096, 32, 128]}))
    result = run("plan", "--offload", "--model", "opt-6.7b", "--context", "2000", "--profile", str(profile))
    assert result.code == 0 and "opt-6.7b: opt, 32 layers" in result.out, result.err


def test_column_by_column(run: Run, multi_head: str, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = run(
        "plan", "--offload", "--model", multi_head, "--context", "1000", "--batch", "8", "--batches", "4",
        "--profile", str(profile), "--json", str(out),
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "column by column, 4 batches" in result.out and "weights cross" in result.out
    parts = json.loads(out.read_text())["results"][0]["layer_seconds"]
    weights = 4 * (4 * 64 * 64 + 2 * 64 * 96 + 5 * 64 + 96 + 4 * 64)  # projections, MLP, their biases, two norms
    assert parts["weights"] == pytest.approx(weights / 1e9, rel=0.01)


def test_measured_on_a_cpu(run: Run, multi_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; the second time the file in the cache folder is read."""
    from deltakv.offload import profiler

    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path))
    monkeypatch.setattr(profiler.measure, "__kwdefaults__", {"copies": (64, 4096), "tokens": (8, 16), "rows": (1, 2)})
    command = ["plan", "--offload", "--model", multi_head, "--context", "100", "--device", "cpu"]
    assert run(*command).code == 0
    (kept,) = (tmp_path / "offload").iterdir()
    Profile.load(kept)
    monkeypatch.setattr(profiler, "_seconds", None)
    assert run(*command).code == 0


class TestRefused:
    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def test_nothing_to_measure(self, run: Run, multi_head: str) -> None:
        refused(run("plan", "--offload", "--model", multi_head, "--context", "100"), "no GPU", "--profile FILE")

    def test_another_model_s_profile(self, run: Run, model_folder: str, profile: Path) -> None:
        said = run("plan", "--offload", "--model", model_folder, "--context", "500", "--profile", str(profile))
        refused(said, "the profile is of layers", "(64, 2, 16)")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--schedule", "flexgen"], "schedule='flexgen'"),
            (["--bits", "3"], "bits=3"),
            (["--chunk-mib", "0"], "chunk_mib=0"),
            (["--profile", "nowhere.json"], "nowhere.json cannot be read"),
            (["--plot", "a.txt"], "a.txt"),
            (["--context", "9000"], "limit is 4,096"),
        ],
        ids=str,
    )
    def test_options(self, run: Run, multi_head: str, words: list[str], said: str) -> None:
        refused(run("plan", "--offload", "--model", multi_head, "--context", "100", *words), said)

    def test_another_dtype_s_profile(self, run: Run, multi_head: str, profile: Path) -> None:
        words = ("--context", "500", "--profile", str(profile), "--dtype", "float16")
        refused(run("plan", "--offload", "--model", multi_head, *words), "measured in float32", "float16")

    def test_without_offload(self, run: Run, multi_head: str) -> None:
        refused(run("plan", "--model", multi_head, "--profile", "a.json"), "belong to --offload")
