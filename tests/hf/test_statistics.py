"""What the handle counts, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deltakv
from hf.harness import decode, greedy, left_padded, ragged, tokens


def deep_model(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


def test_the_paper_s_formula() -> None:
    """28 layers with 5 in full and 1,024 tokens in the other 23: 5 * len + 23 * 1024 in place of 28 * len."""
    model = deep_model(28)
    method = deltakv.Delta(budget=1024, recent=128, sinks=0, plan="paper")
    ids = tokens(2560).remainder(32)[None]
    with deltakv.apply(model, method) as handle, torch.no_grad():
        assert str(handle.plan) == "FFS" + "R" * 11 + "S" + "R" * 7 + "S" + "R" * 5
        cache = model(ids).past_key_values
        assert handle.stats.steps == handle.stats.rows == handle.stats.attended_tokens == 0
        assert handle.stats.attended_per_row_step == handle.stats.full_per_row_step == 0.0
        # 2,561 to 2,576 tokens. The last kept page is the current one, which the sixteenth token fills.
        for step, length in enumerate(range(2561, 2577), 1):
            handle.stats.reset()
            model(torch.tensor([[7]]), past_key_values=cache)
            attended = 5 * length + 23 * (1024 - 16 + step)
            assert handle.stats.attended_tokens == attended
            assert handle.stats.full_tokens == 28 * length
            assert handle.stats.attended_per_row_step == attended
            assert handle.stats.full_per_row_step == 28 * length
            assert (handle.stats.steps, handle.stats.rows, handle.stats.sparse_rows) == (1, 1, 1)


def test_the_paper_s_formula_with_windows_first() -> None:
    """A WINDOW layer counts as a REUSE one: 3 * len + 25 * 1024, whatever stands before a pick."""
    model = deep_model(28)
    method = deltakv.Delta(budget=1024, recent=128, sinks=16, plan="W" * 4 + "S" + "R" * 6 + "W" + "SFRR" + "R" * 12)
    ids = tokens(2560).remainder(32)[None]
    with deltakv.apply(model, method) as handle, torch.no_grad():
        cache = model(ids).past_key_values
        for step, length in enumerate(range(2561, 2569), 1):
            handle.stats.reset()
            model(torch.tensor([[7]]), past_key_values=cache)
            assert handle.stats.attended_tokens == 3 * length + 25 * (1024 - 16 + step)
            assert handle.stats.attended_tokens == 3 * length + 25 * method.kept_tokens(length)
            assert handle.stats.full_tokens == 28 * length
            assert (handle.stats.steps, handle.stats.rows, handle.stats.sparse_rows) == (1, 1, 1)


def test_rows_at_or_below_min_context_attend_to_everything() -> None:
    """Dense and sparse rows in one batch: each counts what it read."""
    model = deep_model(6)
    method = deltakv.Delta(budget=64, recent=16, sinks=16, min_context=100, plan="FSRRSR")
    rows = [tokens(n).remainder(32) for n in (150, 99, 40)]
    with deltakv.apply(model, method) as handle:
        decode(model, left_padded(rows), torch.full((3, 2), 5))
        # Row 0: 151, 152 sparse; row 1: 100 dense, 101 sparse; row 2: 41, 42 dense.
        full = 151 + 152 + 100 + 101 + 41 + 42
        kept = [48 + 151 - 144, 48 + 152 - 144, 100, 48 + 101 - 96, 41, 42]
        assert handle.stats.steps == 2
        assert handle.stats.rows == 6
        assert handle.stats.sparse_rows == 3
        assert handle.stats.full_tokens == 6 * full
        assert handle.stats.attended_tokens == 3 * full + 3 * sum(kept)
        assert handle.stats.attended_per_row_step == pytest.approx((3 * full + 3 * sum(kept)) / 6)


def test_layers_with_a_window_do_not_count(model_of: Any) -> None:
    """gpt-oss here: 8 layers, 4 of them planned."""
    model = model_of("gpt_oss")
    with deltakv.apply(model, deltakv.Full()) as handle:
        assert handle.planned_layers == [1, 3, 5, 7]
        assert len(handle.plan) == 4
        decode(model, ragged(50), tokens(3)[None])
        assert handle.stats.full_tokens == handle.stats.attended_tokens == 4 * (51 + 52 + 53)
        assert handle.stats.sparse_rows == 0


def test_picks_are_recorded_on_demand(model_of: Any) -> None:
    model = model_of("llama")
    method = deltakv.Delta(budget=64, recent=16, sinks=16, min_context=0, plan="FSRRSR")
    with deltakv.apply(model, method) as handle:
        _, cache = decode(model, ragged(100), tokens(2)[None])
        assert handle.stats.picks == []
        handle.stats.record_picks = True
        with torch.no_grad():
            model(torch.tensor([[5]]), past_key_values=cache)
            model(torch.tensor([[6]]), past_key_values=cache)
        assert [(step, layer) for step, layer, *_ in handle.stats.picks] == [(2, 1), (2, 4), (3, 1), (3, 4)]
        for _, _, pages, n_kept in handle.stats.picks:
            assert pages.dtype == n_kept.dtype == torch.int32
            kept = pages[0, : int(n_kept[0])].tolist()
            assert kept == sorted(set(kept)) and len(kept) == 4
            assert kept[0] == 0 and kept[-1] == 6
        handle.stats.reset()
        assert handle.stats.picks == [] and handle.stats.record_picks and handle.stats.steps == 0


def test_prefill_and_second_prefill_do_not_count(model_of: Any) -> None:
    model = model_of("llama")
    with deltakv.apply(model, deltakv.Full()) as handle, torch.no_grad():
        cache = model(tokens(20)[None]).past_key_values
        model(tokens(5)[None], past_key_values=cache)
        assert handle.stats.steps == 0
        model(tokens(1)[None], past_key_values=cache)
        assert (handle.stats.steps, handle.stats.full_tokens) == (1, 6 * 26)


def test_handle_tells_memory_and_cache(model_of: Any) -> None:
    model = model_of("llama")
    with deltakv.apply(model, deltakv.Full()) as handle:
        assert handle.cache is None
        out = greedy(model, ragged(40), 10)
        assert handle.cache is out.past_key_values
        # 49 tokens stored in 4 pages of 16; 6 layers, K and V, 2 heads of 16 floats.
        assert out.past_key_values.kv_bytes == 4 * 16 * 6 * 2 * 2 * 16 * 4
        del out
        assert handle.cache is None
    assert handle.method == deltakv.Full()
    assert handle.model is model


def test_windows_count_in_the_memory(model_of: Any) -> None:
    model = model_of("gemma3")
    with deltakv.apply(model, deltakv.Full()) as handle:
        _, cache = decode(model, ragged(60), tokens(1)[None])
    # 6 layers hold 61 tokens in 4 pages, 2 hold a window of 32 less the one that it will take in.
    assert cache.kv_bytes == (6 * 64 + 2 * 31) * 2 * 2 * 16 * 4
    assert handle.cache is cache


def test_beams_share_pages(model_of: Any) -> None:
    """Rows made from one share its pages, so three copies of a prompt cost little more than one."""
    model = model_of("llama")
    with deltakv.apply(model, deltakv.Full()) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(tokens(64)[None], past_key_values=cache)
        one = cache.kv_bytes
        cache.batch_repeat_interleave(3)
        assert cache.kv_bytes == one
        model(torch.tensor([[3], [4], [5]]), past_key_values=cache)
        assert cache.kv_bytes == one // 4 * 7  # a fifth page for each of the three


def test_memory_is_told_after_generate(model_of: Any) -> None:
    """`generate` drops its cache, and the statistics still say what it took: pages of 16, K and V, all layers."""
    model = model_of("llama")
    config = model.config
    bytes_a_page = 16 * config.num_key_value_heads * config.head_dim * 4 * 2 * config.num_hidden_layers
    with deltakv.apply(model, deltakv.Full()) as handle, torch.no_grad():
        model.generate(tokens(30)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert handle.cache is None
        assert handle.stats.kv_bytes == 3 * bytes_a_page  # 33 tokens are stored: the last one was only made
