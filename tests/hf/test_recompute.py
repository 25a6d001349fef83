"""K and V made from X again are the ones that the model made: norm, biases, K-norm and RoPE at the old positions."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import deltakv
from deltakv.integrations.hf import recompute as module
from deltakv.integrations.hf.recompute import RECOMPUTABLE, attention_modules, recompute_of, why_not
from hf.harness import TOLERANCE, decode, positions, ragged, tokens

KINDS = ("opt", "llama_mha", "llama", "mistral", "phi3", "qwen2", "qwen3")
HOST: dict[str, Any] = {"recompute": 0.6, "chunk_mib": 8 / 1024, "chunks": 3}


def varied(tiny_model: Any, kind: str) -> Any:
    """A model whose norms do something: their weights start at one."""
    model = tiny_model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_k_and_v_are_those_of_the_model(tiny_model: Any, kind: str) -> None:
    """Against the cache of stock transformers, at positions that padding has shifted."""
    model, batch = varied(tiny_model, kind), ragged(20, 13)
    where, inputs = positions(batch["attention_mask"]), {}
    hooks = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: inputs.update({layer: (args or [kwargs["hidden_states"]])[0]}),
            with_kwargs=True,
        )
        for layer, attention in enumerate(attention_modules(model))
    ]
    with torch.no_grad():
        cache = model(**batch, position_ids=where, use_cache=True).past_key_values
        for layer, x in inputs.items():
            k, v = recompute_of(model, layer)(x.transpose(0, 1), where.T)
            stored = cache.layers[layer]
            torch.testing.assert_close(k.permute(1, 2, 0, 3), stored.keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(v.permute(1, 2, 0, 3), stored.values, atol=1e-5, rtol=1e-5)
    assert len(inputs) == model.config.num_hidden_layers
    for hook in hooks:
        hook.remove()


def unrotated(make: Any) -> Any:
    return lambda model, layer: make(without(model, "rotary_emb"), layer)


def elsewhere(make: Any) -> Any:
    def wrong(model: Any, layer: int) -> Any:
        right = make(model, layer)
        return lambda x, where: right(x, where + 1)

    return wrong


def unbiased(make: Any) -> Any:
    def wrong(model: Any, layer: int) -> Any:
        right, attention = make(model, layer), attention_modules(model)[layer]
        return lambda x, where: tuple(
            y - linear.bias.view(-1, attention.head_dim)
            for y, linear in zip(right(x, where), (attention.k_proj, attention.v_proj), strict=True)
        )

    return wrong


def unnormed(make: Any) -> Any:
    def wrong(model: Any, layer: int) -> Any:
        right, attention = make(model, layer), attention_modules(model)[layer]

        def run(x: Tensor, where: Tensor) -> Any:
            norm, attention.k_norm = attention.k_norm, torch.nn.Identity()
            try:
                return right(x, where)
            finally:
                attention.k_norm = norm

        return run

    return wrong


def without(model: Any, name: str) -> Any:
    decoder = model.get_decoder()
    bare = SimpleNamespace(layers=decoder.layers, **{name: None})
    return SimpleNamespace(get_decoder=lambda: bare, config=model.config)


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("llama_mha", unrotated), ("llama_mha", elsewhere), ("qwen2", unrotated), ("qwen2", elsewhere),
        ("qwen3", unnormed), ("qwen3", unrotated), ("phi3", unrotated), ("opt", unbiased),
    ],
)  # fmt: skip
def test_a_mistake_in_recomputing_shows(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, kind: str, mistake: Callable[[Any], Any]
) -> None:
    """The comparison of logits that every other test rests on is far off its tolerance under each of these."""
    model, batch, continuation = varied(tiny_model, kind), ragged(40, 25), tokens(8).view(2, 4)
    stock, _ = decode(model, batch, continuation)

    def error() -> float:
        with deltakv.apply(model, deltakv.Full(), kv_device=deltakv.Host(**HOST)):
            return float((decode(model, batch, continuation)[0] - stock).abs().max())

    assert error() <= TOLERANCE
    monkeypatch.setattr("deltakv.integrations.hf.offload.recompute_of", mistake(module.recompute_of))
    assert error() > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["opt", "llama_mha", "qwen2", "qwen3"])
def test_sixteen_bits_are_no_further_from_the_truth(tiny_model: Any, kind: str, dtype: torch.dtype) -> None:
    """At most 1.5x the error of the on-device cache, against the same weights in fp32."""
    model, batch, continuation = varied(tiny_model, kind), ragged(60, 40), tokens(40).view(2, 20)
    model = model.to(dtype)
    errors = []
    for where in ("device", deltakv.Host(**HOST)):
        with deltakv.apply(model, deltakv.Full(), kv_device=where):
            errors.append(decode(model, batch, continuation)[0].float())
    exact, _ = decode(model.float(), batch, continuation)
    device, host = ((logits - exact).square().mean().sqrt() for logits in errors)
    assert 0 < host <= 1.5 * device


def test_every_covered_type_is_tested() -> None:
    assert {"llama" if kind == "llama_mha" else kind for kind in KINDS} == set(RECOMPUTABLE)


def test_under_an_adapter(tiny_model: Any) -> None:
    """The adapter's part of the projections is repeated too."""
    peft = pytest.importorskip("peft")
    model, row = tiny_model("llama_mha"), tokens(40)[None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
        ).eval()
    with torch.no_grad():
        expected = adapted(row).logits[:, 30:]
        with deltakv.apply(adapted, deltakv.Full(), kv_device=deltakv.Host(**HOST)):
            cache = adapted(row[:, :30]).past_key_values
            ours = adapted(row[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


class TestObstacles:
    def test_none(self, model_of: Any) -> None:
        assert {kind: why_not(model_of(kind)) for kind in KINDS} == dict.fromkeys(KINDS, "")

    def test_another_type(self, model_of: Any) -> None:
        assert "not for 'gemma3_text'" in why_not(model_of("gemma3"))

    def test_rope_that_changes_with_length(self) -> None:
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        )  # fmt: skip
        assert "'dynamic' rotates a token differently" in why_not(transformers.LlamaForCausalLM(config))

    def test_a_joint_projection_with_an_adapter(self, tiny_model: Any) -> None:
        model = tiny_model("phi3")
        attention_modules(model)[2].qkv_proj = torch.nn.Sequential(attention_modules(model)[2].qkv_proj)
        assert "no plain nn.Linear" in why_not(model)
