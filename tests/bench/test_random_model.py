"""Random models and caches: they are what they say, and a step on them is a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, OPTConfig

import deltakv
from deltakv.bench.dims import DIMS, find_config, make_model
from deltakv.bench.kernels import Kernel, parts
from deltakv.bench.random_model import fill_paged, make_static
from deltakv.bench.step import STATIC, Settings, contender, step_bytes
from deltakv.errors import InputError, UnsupportedModelError

CPU = torch.device("cpu")
#: fp32 logits of two ways to compute the same mathematics.
TOLERANCE = 1e-4
SPARSE = deltakv.Delta(budget=64, recent=16, sinks=16, min_context=0)


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, initializer_range=0.14,
    )  # fmt: skip
    return make_model(config, torch.float32, CPU)


@pytest.mark.parametrize("name", [name for name in DIMS if name != "tiny"])
def test_named_dimensions_are_models_of_that_size(name: str) -> None:
    from transformers import AutoModelForCausalLM

    billions = float(name.rpartition("-")[2].removesuffix("b"))
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(find_config(name)).num_parameters()
    assert 0.9 * billions < count / 1e9 < 1.25 * billions


def test_a_config_file_and_what_is_not_one(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DIMS["qwen3-8b"]), encoding="utf-8")
    assert find_config(str(file)).num_hidden_layers == 36
    with pytest.raises(InputError, match=r"does not exist"):
        find_config(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="r1-distill-qwen-7b"):
        find_config(str(tmp_path / "nowhere"))
    file.write_text(json.dumps(DIMS["qwen3-8b"])[:-20], encoding="utf-8")
    for broken in (file, tmp_path):
        with pytest.raises(InputError, match="cannot load"):
            find_config(str(broken))
    file.write_text(json.dumps({"model_type": "bloom"}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        find_config(str(file))


def test_a_filled_cache_decodes_as_stock_does_from_the_same_k_and_v(model: Any) -> None:
    token = torch.tensor([[7], [9], [11]])
    lengths = [150, 33, 97]
    with torch.no_grad(), deltakv.apply(model, deltakv.Full()) as handle:
        cache = handle.new_cache(200)
        fill_paged(cache, model, lengths)
        assert [row.length for row in cache.kv.rows] == lengths and cache.get_seq_length() == 150
        kept = [
            [tuple(x[row.pages].flatten(0, 1)[: row.length].transpose(0, 1)[None].clone() for x in pool) for pool in
             (cache.kv.pool.layer(layer) for layer in range(6))]
            for row in cache.kv.rows
        ]  # fmt: skip
        positions = torch.tensor(lengths)[:, None]
        mask = torch.arange(151) >= 150 - positions
        ours = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for row, layers in enumerate(kept):
        dynamic = DynamicCache(config=model.config)
        for layer, (k, v) in enumerate(layers):
            assert not k.isnan().any() and k.std() > 0.9 and v.std() > 0.9
            dynamic.update(k, v, layer)
        with torch.no_grad():
            stock = model(token[row : row + 1], past_key_values=dynamic).logits
        torch.testing.assert_close(ours[row : row + 1], stock, atol=TOLERANCE, rtol=0)


def test_filling_again_keeps_the_memory(model: Any) -> None:
    with deltakv.apply(model, SPARSE) as handle:
        cache = handle.new_cache(300)
        fill_paged(cache, model, [300, 300])
        places = [tensor.data_ptr() for tensor in (*cache.kv.pool.k, *cache.kv.pool.v)]
        fill_paged(cache, model, [20, 170])
        assert [tensor.data_ptr() for tensor in (*cache.kv.pool.k, *cache.kv.pool.v)] == places
        assert [row.length for row in cache.kv.rows] == [20, 170]


def test_windowed_layers_are_refused(tiny_model: Any) -> None:
    model = tiny_model("gemma3")
    with deltakv.apply(model, deltakv.Full()) as handle, pytest.raises(InputError, match="sliding window"):
        fill_paged(handle.new_cache(64), model, [40])


def test_a_static_cache_counts_what_it_is_told(model: Any) -> None:
    cache = make_static(model, 2, 100)
    for layer in cache.layers:
        layer.cumulative_length.fill_(60)
    assert int(cache.get_seq_length()) == 60
    assert not any(layer.keys.isnan().any() for layer in cache.layers)


@pytest.mark.parametrize("compiled", [False, True])
def test_contenders_decode_and_let_go_of_their_memory(
    model: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    monkeypatch.setattr(torch, "compile", lambda run, **options: run)  # on a GPU by inductor; here its logic counts
    settings = Settings(runs=3, warmup=1, compiled=compiled, loop=2)
    for name, method in (("full", deltakv.Full()), ("delta", SPARSE), (STATIC, STATIC)):
        with contender(model, name, method, 2, 120 + settings.room, compiled=compiled) as one:
            entries = [one.measure(lengths, settings) for lengths in ([120, 120], [120, 12])]
            memory = weakref.ref(one.cache)
            if one.handle is not None:
                steps = 3 + 1 + 14  # timed, before those, and of the loop, at which the row of 12 tokens is dense
                assert one.handle.stats.sparse_rows == (0 if name == "full" else 2 * 2 * steps - steps)
        assert memory() is None
        for entry, lengths in zip(entries, ([120, 120], [120, 12]), strict=True):
            numbers = entry.numbers(bandwidth=1e9)
            assert (numbers["method"], numbers["batch"], numbers["tokens"]) == (name, 2, sum(lengths))
            assert numbers["runs"] == 3 and numbers["generate_ms"] is not None
            assert numbers["share_of_floor"] == pytest.approx(numbers["floor_ms"] / numbers["median_ms"])


def test_bytes_of_a_step_by_hand(model: Any) -> None:
    """Weights once, the input embedding left out; K and V of every layer, or of the pick, the new token included."""
    a_token = 2 * 2 * 16 * 4
    weights = 4 * (model.num_parameters() - 128 * 64)
    assert step_bytes(model, deltakv.Full(), [150, 32]) == (weights, 6 * a_token * (151 + 33))
    # Plan FFSSRS: one layer reuses; 151 tokens are 10 pages, the last with 7: 3 * 16 + 7 are read. 33 are 3 pages.
    assert str(SPARSE.layer_plan(6)) == "FFSSRS"
    assert step_bytes(model, SPARSE, [150, 32]) == (weights, a_token * (5 * (151 + 33) + 55 + 33))


def test_of_embeddings_only_rows_are_read() -> None:
    """OPT's table of positions is one, too; what is tied to the head is read as the head."""
    config = OPTConfig(
        vocab_size=128, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    opt = make_model(config, torch.float32, CPU)
    weights, _ = step_bytes(opt, deltakv.Full(), [10])
    assert weights == 4 * (opt.num_parameters() - opt.model.decoder.embed_positions.weight.numel())


def test_kernels_by_what_they_do() -> None:
    kernels = [
        Kernel("nvjet_sm90_tst_320x64_64x4_4x1_v_bz_TNT", 28, 2800.0),
        Kernel("_attend", 28, 5000.0),
        Kernel("void cutlass::gemm_kernel<8>", 1, 200.0),
        Kernel("_merge", 5, 40.0),
        Kernel("fmha_cutlassF_bf16", 1, 60.0),
        Kernel("triton_red_fused_argmax_select_14", 1, 30.0),
        Kernel("_select", 3, 20.0),
        Kernel("_score", 3, 70.0),
    ]
    found = parts(kernels, weight_bytes=4e9, kv_bytes=2e9, bandwidth=2e12)
    assert [(part["part"], part["calls"], part["microseconds"], part["floor_us"]) for part in found] == [
        ("attention", 34, 5100.0, 1000.0),
        ("scoring and picking", 6, 90.0, 0.0),
        ("matrix products", 29, 3000.0, 2000.0),
        ("the rest", 1, 30.0, 0.0),
    ]
    assert parts([], 1.0, 1.0, 1.0) == []
