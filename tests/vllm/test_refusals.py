"""What is refused by name, and with which advice: a test for each row of the table in docs/vllm.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import SPARSE, Driver, EngineError, ask, prompt


def save_config(folder: Path, kind: str, **options: Any) -> str:
    """A model of which there is just a config."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    config.architectures = [options.pop("architecture", f"{kind}ForCausalLM")]
    config.save_pretrained(folder)
    return str(folder)


SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
}  # fmt: skip

#: By the table's words: the engine's arguments, the settings, and what the refusal has to say.
ENGINES: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "CUSTOM without settings": ({}, None, ("CUSTOM without", '"deltakv"', "--additional-config")),
    "settings without CUSTOM": ({"attention_backend": None}, SPARSE, ("is not CUSTOM", "--attention-backend CUSTOM")),
    "settings that are no object": ({}, 3, ("must be an object",)),
    "unknown algorithm": ({}, {"algorithm": "quests"}, ("unknown method 'quests'", "delta")),
    "a method that is not served": (
        {}, {"algorithm": "quest"}, ("'quest' is not served", "delta, full, indexcache, tidal"),
    ),
    "unknown option": ({}, {"budgets": 64}, ("no option 'budgets'", "budget")),
    "unknown tp_selection": ({}, {"tp_selection": "both"}, ("tp_selection='both'", "global, local")),
    "fp8 KV": ({"kv_cache_dtype": "fp8"}, SPARSE, ("--kv-cache-dtype fp8", "bfloat16")),
    "decode-context parallelism": (
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, SPARSE,
        ("context parallelism", "--decode-context-parallel-size 1"),
    ),
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}, SPARSE,
        ("speculative decoding", "--speculative-config"),
    ),
    "block size": ({"block_size": 32}, SPARSE, ("blocks of 32", "page_size=16", "--block-size 16")),
    "default block size": ({"block_size": None}, SPARSE, ("blocks of 128", "--block-size 16")),
    "plan's depth": ({}, {**SPARSE, "plan": "FFSRRR"}, ("FFSRRR is for 6 layers", "8 layers")),
    "pipeline stage": (
        {"pipeline_parallel_size": 2}, {**SPARSE, "plan": "FFSRRRRR"},
        ("pipeline stage 1 (layers 4 to 7)", "make layer 4 'S'", "plan=FFSRSRRR"),
    ),
    "pipeline stages": (
        {"pipeline_parallel_size": 4}, {**SPARSE, "plan": "FSRRRRRR"},
        ("pipeline stage 1 (layers 2 to 3)", "2 more stages", "layer 2 and 4 and 6", "plan=FSSRSRSR"),
    ),
    "another backend for some layers": (
        {"attention_config": {"backend_per_kind": {"sliding_window": "FLASH_ATTN"}}}, SPARSE,
        ("not CUSTOM for all layers",),
    ),
    "pooling": ({"runner": "pooling", "convert": "embed"}, SPARSE, ("--runner pooling", "no decode steps")),
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "MLA": (
        "DeepseekV2",
        {**SMALL, "head_dim": None, "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16,
         "qk_nope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 4, "num_key_value_heads": 4},
        ("MLA", "deepseek_v2", "VLLM_MLA_DISABLE=1"),
    ),
    "sliding windows alone": ("Mistral", {**SMALL, "sliding_window": 64}, ("every layer has a sliding window",)),
    "soft-capping": ("Gemma2", {**SMALL, "attn_logit_softcapping": 50.0}, ("soft-capping", "50")),
    "other layer kinds": (
        "Qwen3Next",
        {**SMALL, "layer_types": ["linear_attention", "full_attention"] * 4, "num_experts": 0},
        ("linear_attention", "full_attention and sliding_attention"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENGINES)
def test_engine(engines: Driver, tiny: str, case: str) -> None:
    arguments, settings, said = ENGINES[case]
    with pytest.raises(EngineError) as refused:
        engines.check(tiny, settings, **arguments)
    for words in said:
        assert words in str(refused.value)


@pytest.mark.parametrize("case", MODELS)
def test_model(engines: Driver, tmp_path: Path, case: str) -> None:
    kind, options, said = MODELS[case]
    with pytest.raises(EngineError) as refused:
        engines.check(save_config(tmp_path, kind, **options), {"algorithm": "delta"})
    for words in said:
        assert words in str(refused.value)


@pytest.mark.parametrize("case", ["CUSTOM without settings", "settings without CUSTOM", "block size"])
def test_an_engine_asks_before_it_loads(engines: Driver, tmp_path: Path, case: str) -> None:
    """`check` is not only there for `deltakv serve`: an engine that is started otherwise refuses too, here before it
    finds out that there are no weights."""
    arguments, settings, said = ENGINES[case]
    with pytest.raises(EngineError) as refused:
        engines.run(save_config(tmp_path, "Llama", **SMALL), ask(prompt(20, 0)), settings=settings, **arguments)
    assert "UnsupportedUseError" in str(refused.value) and said[0] in str(refused.value)


def test_what_goes_together_passes(engines: Driver, tiny: str, tmp_path: Path) -> None:
    """The same kinds, next to what is refused."""
    assert engines.check(tiny, attention_backend=None) is None
    assert engines.check(tiny, SPARSE) == "FFSRSRSR"
    assert engines.check(tiny, {"page_size": 32, "sinks": 32}, block_size=32) == "FFSRSRSR"
    assert engines.check(tiny, {**SPARSE, "plan": "FFSRSRRR"}, pipeline_parallel_size=2) == "FFSRSRRR"
    assert engines.check(tiny, {**SPARSE, "plan": "FSSRSRSR"}, pipeline_parallel_size=4) == "FSSRSRSR"
    assert engines.check(tiny, {**SPARSE, "plan": "WFSRWWWW"}, pipeline_parallel_size=2) == "WFSRWWWW"
    assert engines.check(tiny, {"algorithm": "full"}) == "F" * 8
    windows = {**SMALL, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 4}
    half = save_config(tmp_path, "Qwen2", **windows, use_sliding_window=True)
    assert engines.check(half, {**SPARSE, "plan": "FSRR"}) == "FSRR"
    with pytest.raises(EngineError, match=r"plan=FFSS has no layer that attends to a pick .* the 4 layers without"):
        engines.check(half, SPARSE)
