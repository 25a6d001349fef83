"""The GPU backend without a GPU: in vLLM's CPU engine, with plain PyTorch for FlashAttention (pretended_gpu.py), and
its parts on their own. tests/gpu/test_vllm_gpu.py is what needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SPARSE, Driver, Row, ask
from test_outputs import CLOSE, LONG, MIDDLE, SHORT, by_transformers, difference
from test_parts import python

import deltakv


@pytest.mark.parametrize("part", ["replayed", "split", "marked", "beside", "platforms", "backend", "figures", "ranks"])
def test_part(part: str) -> None:
    assert run("gpu_parts", part) == "as expected"


def test_the_newer_model_runner() -> None:
    assert run("gpu_runner", "second_runner") == "as expected"


def run(module: str, part: str) -> str:
    here = str(Path(__file__).parent)
    return python(f"import sys; sys.path.insert(0, {here!r}); import {module}; {module}.{part}()")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Driver]:
    driver = Driver(VLLM_PLUGINS="", DELTAKV_TEST_GPU_BACKEND="1")
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def alone(gpu: Driver, tiny: str) -> list[Row]:
    """Each prompt alone."""
    return [rows[0] for rows in gpu.run(tiny, ask(LONG), ask(MIDDLE), ask(SHORT), settings=SPARSE)]


def test_sparse_is_what_transformers_gives(tiny: str, alone: list[Row]) -> None:
    options = {key: value for key, value in SPARSE.items() if key != "algorithm"}
    for row, tokens in zip(alone, (LONG, MIDDLE, SHORT), strict=True):
        assert difference(row, by_transformers(tiny, deltakv.Delta(**options), tokens, len(row.tokens))) < CLOSE


@pytest.mark.parametrize("settings", [{"algorithm": "full"}, {**SPARSE, "budget": 512}])
def test_where_all_pages_are_kept_it_is_stock(
    gpu: Driver, stock: Driver, tiny: str, alone: list[Row], settings: dict[str, object]
) -> None:
    rows = gpu.run(tiny, ask(LONG, MIDDLE, SHORT), settings=settings)[0]
    for row, want in zip(rows, stock.run(tiny, ask(LONG, MIDDLE, SHORT), attention_backend=None)[0], strict=True):
        assert difference(row, want) < CLOSE
    assert float((rows[0].logprobs[1] - alone[0].logprobs[1]).abs().max()) > 100 * CLOSE, "sparse changes something"


@pytest.mark.parametrize("plan", ["FFSRRSRR", "FSRFRSSR", "WWSRWRSW"])
def test_a_row_crosses_min_context(gpu: Driver, tiny: str, plan: str) -> None:
    options = {"budget": 64, "recent": 32, "sinks": 0, "min_context": 304, "plan": plan}
    ((row,),) = gpu.run(tiny, ask(LONG), settings=options)
    assert difference(row, by_transformers(tiny, deltakv.Delta(**options), LONG, len(row.tokens))) < CLOSE


@pytest.mark.parametrize("plan", ["SRRRRR", "FSRRSR", "WSRWRW"])
def test_layers_with_a_window_keep_it(gpu: Driver, windowed: str, plan: str) -> None:
    """Several block tables: a pick that was made on one is followed on the others."""
    options = {"budget": 64, "recent": 16, "sinks": 16, "min_context": 64, "plan": plan}
    ((row,),) = gpu.run(windowed, ask(LONG), settings=options)
    assert difference(row, by_transformers(windowed, deltakv.Delta(**options), LONG, len(row.tokens))) < CLOSE


def test_layers_with_a_window_on_one_block_table(gpu: Driver, windowed: str) -> None:
    """Without the hybrid manager; the windowed layers keep a metadata of their own."""
    options = {"budget": 64, "recent": 16, "sinks": 16, "min_context": 64, "plan": "FSRRSR"}
    ((row,),) = gpu.run(windowed, ask(LONG), settings=options, disable_hybrid_kv_cache_manager=True)
    assert difference(row, by_transformers(windowed, deltakv.Delta(**options), LONG, len(row.tokens))) < CLOSE


def test_a_mixed_batch_is_each_row_alone(gpu: Driver, tiny: str, alone: list[Row]) -> None:
    """Decode rows beside chunks of prompts, which are read 64 tokens a step."""
    rows = gpu.run(
        tiny, ask(LONG, MIDDLE, SHORT), ask(SHORT, LONG, MIDDLE), settings=SPARSE, max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )  # fmt: skip
    for row, want in zip([*rows[0], *rows[1]], [*alone, alone[2], *alone[:2]], strict=True):
        assert difference(row, want) < CLOSE


def test_a_prompt_that_comes_later_is_put_behind(gpu: Driver, tiny: str, alone: list[Row]) -> None:
    ((_, row, late),) = gpu.run(
        tiny, ask(SHORT, LONG, MIDDLE, tokens=[3, 12, 12]), settings=SPARSE, max_num_seqs=2, max_num_batched_tokens=512
    )
    assert difference(row, alone[0]) < CLOSE and difference(late, alone[1]) < CLOSE


@pytest.mark.parametrize("budget", [299, 100])
def test_chunked_prefill_is_unchunked(gpu: Driver, tiny: str, alone: list[Row], budget: int) -> None:
    """299 leaves a last chunk of one token, in a batch of one-token rows: it attends to all before it all the same."""
    ((row,),) = gpu.run(
        tiny, ask(LONG), settings=SPARSE, max_num_batched_tokens=budget, max_num_seqs=4, enable_prefix_caching=False
    )
    assert difference(row, alone[0]) < CLOSE
