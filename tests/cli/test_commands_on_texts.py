"""`deltakv compare`, `inspect` and `plan` on a tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Run

from deltakv.evals.texts import builtin_text

SPARSE = "delta:budget=64,recent=16,sinks=16,min_context=0,plan=FSRRSR"
COVERS = "delta:budget=640,recent=16,sinks=16,min_context=0,plan=FSRRSR"
FIELDS = {
    "method", "context", "batch", "decode_tokens_per_s", "attended_tokens", "kl_mean", "kl_p99", "top1",
    "perplexity", "recall_by_layer", "kv_bytes", "peak_memory_bytes",
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_compare(run: Run, model_folder: str, tmp_path: Path, batch: int) -> None:
    json_file = tmp_path / "compare.json"
    methods = [
        "full",
        SPARSE,
        COVERS,
        "stock",
        "stock-static",
        "delta:page_size=32,budget=64,recent=32,sinks=32",
    ]
    options = [word for method in methods for word in ("--method", method)]
    result = run(
        "compare", "--model", model_folder, *options, "--context", "600", "--positions", "100", "--steps", "8",
        "--batch", str(batch), "--no-memory", "--json", str(json_file),
    )  # fmt: skip
    assert result.code == 0, result.err
    data = json.loads(json_file.read_text(encoding="utf-8"))
    assert json_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert data["text"] == "pydoc_data.topics"
    by_method = {entry["method"]: entry for entry in data["results"]}
    assert list(by_method) == methods
    for entry in by_method.values():
        assert set(entry) >= FIELDS
        assert entry["context"] == 600 and entry["batch"] == batch
        assert entry["decode_tokens_per_s"] > 0 and math.isfinite(entry["perplexity"])
    full, sparse, covers = (by_method[name] for name in methods[:3])
    for same in (full, covers, by_method["stock"], by_method["stock-static"]):
        assert same["kl_mean"] < 1e-6 and same["top1"] == 1.0
        assert same["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)
    assert sparse["kl_mean"] > 1e-4 and sparse["kl_p99"] >= sparse["kl_mean"]
    assert set(sparse["recall_by_layer"]) == {"2", "3", "5"} and not full["recall_by_layer"]
    assert all(0 < share < 1 for share in sparse["recall_by_layer"].values())
    assert all(share == pytest.approx(1, abs=1e-4) for share in covers["recall_by_layer"].values())
    # Steps at lengths 601 to 609; the pick is 4 pages, the last of which is partly filled.
    lengths = range(601, 610)
    assert full["attended_tokens"] == pytest.approx(6 * sum(lengths) / 9)
    kept = sum(64 - (-length % 16) for length in lengths) / 9
    assert sparse["attended_tokens"] == pytest.approx(3 * sum(lengths) / 9 + 3 * kept)
    # Perplexity is that of the tokens that follow positions 500 to 599, by the stock model.
    model, tokenizer = (
        kind.from_pretrained(model_folder) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    ids = torch.tensor([tokenizer(builtin_text()[:20_000])["input_ids"][:601]])
    with torch.no_grad():
        surprise = -model(ids).logits[0].double().log_softmax(-1)[500:600].gather(1, ids[0, 501:601, None])
    assert full["perplexity"] == pytest.approx(surprise.mean().exp().item(), rel=1e-5)
    # K and V of 600 tokens in whole pages, 6 layers, 2 heads of 16, fp32.
    assert full["kv_bytes"] == batch * 608 * 6 * 2 * 2 * 16 * 4


def test_compare_measures_memory_in_fresh_processes(run: Run, model_folder: str, tmp_path: Path) -> None:
    json_file = tmp_path / "compare.json"
    result = run(
        "compare", "--model", model_folder, "--method", "full", "--method", "stock-static", "--context", "300",
        "--positions", "20", "--steps", "0", "--json", str(json_file), "--plot", str(tmp_path / "out.svg"),
    )  # fmt: skip
    assert result.code == 0, result.err
    results = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    for entry in results:
        assert 50e6 < entry["peak_memory_bytes"] < 4e9 and entry["kv_bytes"] > 0
        assert entry["decode_tokens_per_s"] is None
    assert "<svg" in (tmp_path / "out.svg").read_text(encoding="utf-8")


def test_compare_on_a_model_with_windows(run: Run, tmp_path: Path) -> None:
    from command_line import save_model
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=1024, sliding_window=32,
        initializer_range=0.14, layer_types=["sliding_attention", "full_attention"] * 3, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    folder = str(save_model(tmp_path / "gemma", config))
    json_file = tmp_path / "compare.json"
    options = (
        "compare",
        "--model",
        folder,
        "--context",
        "400",
        "--positions",
        "50",
        "--steps",
        "8",
        "--no-memory",
    )
    sparse = "delta:budget=64,recent=16,min_context=0,plan=FSR"
    result = run(
        *options,
        "--method",
        "full",
        "--method",
        sparse,
        "--method",
        "stock",
        "--batch",
        "2",
        "--json",
        str(json_file),
    )
    assert result.code == 0, result.err
    full, delta, stock = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    assert full["kl_mean"] < 1e-6 and stock["kl_mean"] < 1e-6 < delta["kl_mean"]
    assert set(delta["recall_by_layer"]) == {"5"}
    refused = run(*options, "--method", "stock-static")
    assert refused.code == 2 and "sliding-window" in refused.err


def test_inspect(run: Run, model_folder: str, tmp_path: Path) -> None:
    out, json_file = tmp_path / "picks.png", tmp_path / "picks.json"
    result = run(
        "inspect", "--model", model_folder, "--method", SPARSE, "--context", "400", "--steps", "40",
        "--out", str(out), "--json", str(json_file),
    )  # fmt: skip
    assert result.code == 0, result.err
    assert out.read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert "{{" not in page and 'name="viewport"' in page
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", page), "the page needs something from outside"
    data = json.loads(json_file.read_text(encoding="utf-8"))
    assert set(data["picks"]) == {"1", "4"} and set(data["recall_by_layer"]) == {"2", "3", "5"}
    for rows in data["picks"].values():
        assert len(rows) == 40
        for step, pages in enumerate(rows):
            last = (360 + step) // 16
            assert len(pages) == 4 and pages == sorted(pages) and pages[0] == 0 and pages[-1] == last
    assert "layer   2  recall" in result.out and str(out) in result.out


def test_plan(run: Run, model_folder: str, tmp_path: Path) -> None:
    json_file = tmp_path / "plan.json"
    result = run(
        "plan", "--model", model_folder, "--method", SPARSE, "--context", "500,1000", "--batch", "4",
        "--dtype", "float32", "--json", str(json_file),
    )  # fmt: skip
    assert result.code == 0, result.err
    data = json.loads(json_file.read_text(encoding="utf-8"))
    assert data["plan"] == "FSRRSR" and [layer["role"] for layer in data["layers"]] == list("FSRRSR")
    a_token = 2 * 2 * 16 * 4
    for entry, length in zip(data["results"], (500, 1000), strict=True):
        kept = 64 - (-length % 16)
        assert entry["attended_tokens"] == 3 * length + 3 * kept
        assert entry["kv_bytes"] == 4 * a_token * (3 * length + 3 * kept)
        assert entry["full_kv_bytes"] == 4 * a_token * 6 * length
        assert entry["kv_bytes_by_role"]["R"] == 4 * a_token * 3 * kept
        assert entry["predicted_speedup"] > 1
    attention, mlp = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96
    assert data["results"][0]["weight_bytes"] == 4 * (6 * (attention + mlp + 2 * 64) + 64 + 257 * 64)
    assert "REUSE" in result.out and "x faster" in result.out


def test_plan_with_windows(run: Run, model_folder: str, tmp_path: Path) -> None:
    json_file = tmp_path / "plan.json"
    method = f"{SPARSE.partition(',plan')[0]},plan=WWSRWR"
    result = run("plan", "--model", model_folder, "--method", method, "--context", "500", "--json", str(json_file))
    assert result.code == 0, result.err
    (entry,) = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    assert entry["attended_tokens"] == 500 + 5 * (64 - 12)
    assert entry["kv_bytes_by_role"]["W"] * 2 == entry["kv_bytes_by_role"]["R"] * 3
    assert "WINDOW" in result.out


@pytest.mark.parametrize("command", ["generate", "compare", "inspect", "plan"])
def test_help_has_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0 and f"deltakv {command}" in result.out and "Example:" in result.out
    assert "--json" in result.out


def test_version(run: Run) -> None:
    from deltakv import __version__

    assert run("--version").out.strip() == f"deltakv {__version__}"


FIELD = (
    "streaming:window=48", "quest:budget=64", "tidal:budget=64", "lessismore:budget=64", "tactic:budget=128,mass=0.6",
    "indexcache:budget=64", "tokenselect:budget=64,recent=16", "refreshkv:budget=64,stride=4",
    "h2o:budget=64,recent=32", "a2sf:budget=64", "lazyeviction:budget=64,recent=16,lag=16",
)  # fmt: skip


def test_the_field_is_compared_like_delta(run: Run, model_folder: str, tmp_path: Path) -> None:
    """Fidelity, speed and attended tokens of every method, on one prefill."""
    json_file = tmp_path / "field.json"
    options = [word for method in ("full", *FIELD) for word in ("--method", method)]
    result = run(
        "compare", "--model", model_folder, *options, "--context", "600", "--positions", "60", "--steps", "4",
        "--no-memory", "--json", str(json_file),
    )  # fmt: skip
    full, *field = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    assert [entry["method"] for entry in field] == list(FIELD)
    for entry in field:
        assert 0 < entry["kl_mean"] < 20
        evicts = entry["method"].startswith(("h2o", "a2sf", "lazyeviction"))
        assert entry["decode_tokens_per_s"] is None if evicts else entry["decode_tokens_per_s"] > 0
        assert 0 < entry["attended_tokens"] <= full["attended_tokens"]
        assert entry["recall_by_layer"] and all(0 <= share <= 1 for share in entry["recall_by_layer"].values())
    assert "no speed: the steps that are timed are over before" in " ".join(result.out.split())


def test_memory_of_a_method_that_evicts(run: Run, model_folder: str, tmp_path: Path) -> None:
    json_file = tmp_path / "memory.json"
    run(
        "compare", "--model", model_folder, "--method", "full", "--method", "h2o:budget=64,recent=32,lag=4",
        "--context", "600", "--positions", "8", "--steps", "0", "--json", str(json_file),
    )  # fmt: skip
    full, h2o = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    assert h2o["kv_bytes"] <= full["kv_bytes"] * 5 / 38


@pytest.mark.parametrize(
    ("method", "attended"),
    [
        ("quest:budget=64", 2 * 200 + 4 * (56 + 13)),
        ("tokenselect:budget=64,recent=16", 6 * (56 + 100)),
        ("refreshkv:budget=64,stride=10", 6 * (56 + 15)),
        ("streaming:window=48,sinks=16", 6 * 56),
        ("h2o:budget=64,recent=32", 6 * (5 * 16 - 8)),
    ],
)
def test_plan_knows_what_is_read_to_pick(
    run: Run, model_folder: str, tmp_path: Path, method: str, attended: int
) -> None:
    """At 200 tokens: 13 pages, the last of 8 tokens."""
    json_file = tmp_path / "plan.json"
    run("plan", "--model", model_folder, "--method", method, "--context", "200", "--json", str(json_file))
    (result,) = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    assert result["attended_tokens"] == attended


@pytest.mark.parametrize("method", ["quest:budget=64", "refreshkv:budget=64,stride=4", "h2o:budget=64,recent=32"])
def test_inspect_shows_their_picks(run: Run, model_folder: str, tmp_path: Path, method: str) -> None:
    json_file = tmp_path / "picks.json"
    words = ("--context", "300", "--steps", "20", "--json", str(json_file), "--out", str(tmp_path / "picks.png"))
    result = run("inspect", "--model", model_folder, "--method", method, *words)
    assert result.code == 0, result.err
    picks = json.loads(json_file.read_text(encoding="utf-8"))["picks"]
    assert all(len(steps) == 20 and all(pages == sorted(set(pages)) for pages in steps) for steps in picks.values())
