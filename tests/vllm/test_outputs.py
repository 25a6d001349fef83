"""What an engine with the plugin answers: stock bits where nothing is sparse, the transformers integration's numbers
where something is, and the same whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import SPARSE, Driver, Row, ask, prompt

import deltakv

#: float32 through two implementations of the same model: logits of a few tens, and sums in another order.
CLOSE = 2e-4

LONG, MIDDLE, SHORT = prompt(300, 1), prompt(171, 2), prompt(40, 3)


def by_transformers(folder: str, method: Any, tokens: list[int], new: int) -> Row:
    """Greedy decoding of one prompt through `deltakv.apply`, step by step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen, logprobs = [], []
    with torch.inference_mode(), deltakv.apply(model, method) as handle:
        cache, ids = handle.new_cache(), torch.tensor([tokens])
        for _ in range(new):
            logits = model(ids, past_key_values=cache).logits[0, -1]
            logprobs.append(torch.log_softmax(logits, -1))
            chosen.append(int(logits.argmax()))
            ids = torch.tensor([[chosen[-1]]])
    return Row(chosen, torch.stack(logprobs), 0)


def difference(one: Row, other: Row) -> float:
    """The largest difference of two log-probabilities; both have to have chosen the same tokens."""
    assert one.tokens == other.tokens
    return float((one.logprobs - other.logprobs).abs().max())


def assert_equal(ones: list[Row], others: list[Row]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.tokens == other.tokens and torch.equal(one.logprobs, other.logprobs)


@pytest.fixture(scope="module")
def stock_rows(stock: Driver, tiny: str) -> list[Row]:
    return stock.run(tiny, ask(LONG, MIDDLE, SHORT), attention_backend=None)[0]


@pytest.fixture(scope="module")
def sparse_rows(engines: Driver, tiny: str) -> list[Row]:
    """Each prompt alone."""
    alone = engines.run(tiny, ask(LONG), ask(MIDDLE), ask(SHORT), settings=SPARSE)
    return [rows[0] for rows in alone]


def test_without_settings_bits_are_stock(engines: Driver, tiny: str, stock_rows: list[Row]) -> None:
    assert_equal(engines.run(tiny, ask(LONG, MIDDLE, SHORT), attention_backend=None)[0], stock_rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "full"},
        {**SPARSE, "budget": 512},
        {"algorithm": "delta"},
        {**SPARSE, "budget": 512, "plan": "WWFWWWFW"},
    ],
    ids=["full", "budget covers the context", "below min_context", "windows that cover it"],
)
def test_where_all_pages_are_kept_bits_are_stock(
    engines: Driver, tiny: str, stock_rows: list[Row], settings: dict[str, Any]
) -> None:
    assert_equal(engines.run(tiny, ask(LONG, MIDDLE, SHORT), settings=settings)[0], stock_rows)


@pytest.mark.parametrize("plan", ["FFSRRSRR", "SRRRRRRR", "FSRFRSSR", "WWSRWRSW", "WWWWWFWW"])
@pytest.mark.parametrize("page_size", [16, 32])
def test_sparse_is_what_transformers_gives(
    engines: Driver, tiny: str, stock_rows: list[Row], plan: str, page_size: int
) -> None:
    options = {"budget": 96, "recent": 32, "sinks": 32, "min_context": 64, "page_size": page_size, "plan": plan}
    rows = engines.run(tiny, ask(LONG), ask(MIDDLE), settings={**options, "algorithm": "delta"}, block_size=page_size)
    for (row,), tokens, stock_row in zip(rows, (LONG, MIDDLE), stock_rows[:2], strict=True):
        assert difference(row, by_transformers(tiny, deltakv.Delta(**options), tokens, len(row.tokens))) < CLOSE
        assert float((row.logprobs[1] - stock_row.logprobs[1]).abs().max()) > 100 * CLOSE, "sparse changes something"


def test_min_context_and_the_default_plan_are_those_of_transformers(engines: Driver, tiny: str) -> None:
    """The row crosses `min_context` while it is decoded."""
    options = {"budget": 64, "recent": 16, "sinks": 0, "min_context": 304}
    ((row,),) = engines.run(tiny, ask(LONG), settings=options)
    assert difference(row, by_transformers(tiny, deltakv.Delta(**options), LONG, len(row.tokens))) < CLOSE


@pytest.mark.parametrize("plan", ["SRRRRR", "FSRRSR", "WSRWRW"])
def test_layers_with_a_window_keep_it(engines: Driver, windowed: str, plan: str) -> None:
    """Plan letters count the layers without one; these lie in three block tables, and follow picks made on another."""
    options = {"budget": 64, "recent": 16, "sinks": 16, "min_context": 64, "plan": plan}
    ((row,),) = engines.run(windowed, ask(LONG), settings=options)
    assert difference(row, by_transformers(windowed, deltakv.Delta(**options), LONG, len(row.tokens))) < CLOSE


def test_a_mixed_batch_is_each_row_alone(engines: Driver, tiny: str, sparse_rows: list[Row]) -> None:
    """Sparse rows, a dense one, and prompts that are still read: 64 tokens a step spread a prompt over five steps, so
    that the short rows decode beside it."""
    rows = engines.run(
        tiny, ask(LONG, MIDDLE, SHORT), ask(SHORT, LONG, MIDDLE), settings=SPARSE, max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )  # fmt: skip
    for row, alone in zip([*rows[0], *rows[1]], [*sparse_rows, sparse_rows[2], *sparse_rows[:2]], strict=True):
        assert difference(row, alone) < CLOSE


def test_a_mixed_batch_with_windows_is_each_row_alone(engines: Driver, tiny: str) -> None:
    settings = {**SPARSE, "plan": "WWSRWRSW"}
    alone = [rows[0] for rows in engines.run(tiny, ask(LONG), ask(MIDDLE), ask(SHORT), settings=settings)]
    ((row, late, short),) = engines.run(
        tiny, ask(LONG, MIDDLE, SHORT), settings=settings, max_num_batched_tokens=64, enable_prefix_caching=False
    )
    assert max(difference(*pair) for pair in zip((row, late, short), alone, strict=True)) < CLOSE


def test_a_decode_row_behind_a_prompt(engines: Driver, tiny: str, sparse_rows: list[Row]) -> None:
    """There is room for two. The first ends early, and the third takes its place at the head of the batch: its prompt
    is read before the token of the second, whose place among the tokens is then not its place among the rows."""
    ((_, row, late),) = engines.run(
        tiny, ask(SHORT, LONG, MIDDLE, tokens=[3, 12, 12]), settings=SPARSE, max_num_seqs=2, max_num_batched_tokens=512
    )
    assert difference(row, sparse_rows[0]) < CLOSE
    assert difference(late, sparse_rows[1]) < CLOSE


@pytest.mark.parametrize("budget", [299, 100, 43])
def test_chunked_prefill_is_unchunked(engines: Driver, tiny: str, sparse_rows: list[Row], budget: int) -> None:
    """299 leaves a last chunk of one token: a prompt's token all the same, so no decode step."""
    ((row,),) = engines.run(
        tiny, ask(LONG), settings=SPARSE, max_num_batched_tokens=budget, max_num_seqs=4, enable_prefix_caching=False
    )
    assert difference(row, sparse_rows[0]) < CLOSE


def test_a_hit_on_prompt_blocks_is_a_miss(engines: Driver, tiny: str, sparse_rows: list[Row]) -> None:
    first, second = engines.run(tiny, ask(LONG), ask(LONG), settings=SPARSE)
    assert first[0].cached == 0 and second[0].cached == 288
    assert difference(second[0], first[0]) < CLOSE and difference(first[0], sparse_rows[0]) < CLOSE
