"""What a sweep says of its times, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import deltakv
from deltakv.bench import sweep as module
from deltakv.bench.clock import Times
from deltakv.bench.dims import make_model
from deltakv.bench.step import Settings
from deltakv.bench.sweep import sweep, trends


def result(method: str, batch: int, context: int, ms: float) -> dict[str, Any]:
    return {"method": method, "batch": batch, "context": context, "median_ms": ms}


def test_slopes_and_crossover() -> None:
    dense = {1000: 2.0, 2000: 3.0, 3000: 4.0, 5000: 6.0}
    sparse = {1000: 2.5, 2000: 2.9, 3000: 4.1, 5000: 3.2}
    results = [result("full", 8, c, ms) for c, ms in dense.items()]
    results += [result("stock-static", 8, 1000, 1.9)]
    results += [result("delta", 8, c, ms) for c, ms in sparse.items()]
    full, stock, delta = trends(results)
    assert [trend["method"] for trend in (full, stock, delta)] == ["full", "stock-static", "delta"]
    assert full["slope_ms"] == pytest.approx(1.0) and full["slope_ratio"] == pytest.approx(1.0)
    assert stock["slope_ms"] is None and stock["slope_ratio"] is None
    mean = sum(sparse.values()) / 4
    slope = sum((c - 2750) * (ms - mean) for c, ms in sparse.items()) / sum((c - 2750) ** 2 for c in sparse)
    assert delta["slope_ms"] == delta["slope_ratio"] == pytest.approx(1000 * slope)
    assert delta["never_slower_from"] == 5000
    assert delta["worst"] == pytest.approx(2.5 / 1.9 - 1)
    assert full["worst"] == pytest.approx(2.0 / 1.9 - 1) and full["never_slower_from"] == 2000


def test_batches_stand_apart_and_nothing_is_made_up() -> None:
    results = [result("full", 1, 1000, 1.0), result("delta", 1, 1000, 2.0), result("delta", 4, 1000, 1.0)]
    found = {(trend["method"], trend["batch"]): trend for trend in trends(results)}
    assert found["delta", 1]["never_slower_from"] is None and found["delta", 1]["worst"] == 1.0
    assert found["delta", 4]["never_slower_from"] is None and found["delta", 4]["worst"] is None


def test_every_method_at_every_point_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = make_model(config, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(module, "fits", lambda model, batch, tokens: batch * tokens < 500)
    methods = [("full", deltakv.Full()), ("delta", deltakv.Delta(budget=32, recent=16, sinks=16, min_context=0))]
    told: list[str] = []
    out: list[str] = []
    settings = Settings(2, 1, compiled=False)
    entries = list(sweep(model, methods, [64, 32, 300], [1, 3, 64], settings, told.append, out.append))
    points = [(entry.name, len(entry.lengths), entry.lengths[0]) for entry in entries]
    batch_1 = [(name, 1, context) for name in ("full", "delta") for context in (32, 64, 300)]
    assert points == batch_1 + [(name, 3, context) for name in ("full", "delta") for context in (32, 64)]
    assert told == ["full, batch 1", "delta, batch 1", "full, batch 3", "delta, batch 3"]
    assert out == ["300 tokens, batch 3", *(f"{context} tokens, batch 64" for context in (32, 64, 300))]


def test_full_attention_is_dense_whatever_its_options() -> None:
    results = [result("full:page_size=32", 1, c, float(c)) for c in (1, 2)] + [
        result("delta", 1, c, 3.0) for c in (1, 2)
    ]
    full, delta = trends(results)
    assert full["slope_ratio"] == pytest.approx(1.0) and delta["worst"] == pytest.approx(2.0)


def test_medians_and_the_middle_half() -> None:
    times = Times([5.0, 1.0, 9.0, 3.0])
    assert times.median == 4.0 and times.quartiles == (1.5, 8.0)
    assert Times([2.0]).quartiles == (2.0, 2.0)
