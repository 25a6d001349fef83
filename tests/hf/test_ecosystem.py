"""Adapters, quantised weights, devices, compilation: the model may come in any dress."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import deltakv
from hf.harness import SMALL, assert_close, assert_same_generation, decode, greedy, left_padded, ragged, tokens

COVERING = deltakv.Delta(budget=1024, min_context=0)


def needs(package: str) -> pytest.MarkDecorator:
    """Skips where the package is missing; in CI nothing may be missing, so there the test runs and fails."""
    missing = importlib.util.find_spec(package) is None and not os.environ.get("CI")
    return pytest.mark.skipif(missing, reason=f"needs {package}")


@needs("peft")
class TestLora:
    @pytest.fixture
    def adapted(self, tiny_model: Any) -> Any:
        """A PeftModel whose adapter changes the output a lot."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), config).eval()
        model.generation_config.eos_token_id = None
        return model

    def test_applied_to_the_peft_model(self, adapted: Any) -> None:
        batch = ragged(40, 15)
        stock = greedy(adapted, batch, 12)
        with adapted.disable_adapter():
            bare = greedy(adapted, batch, 12)
        assert not torch.allclose(bare.logits, stock.logits, atol=0.1)
        with deltakv.apply(adapted, COVERING) as handle:
            assert_same_generation(greedy(adapted, batch, 12), stock)
            assert handle.stats.steps == 11
            with adapted.disable_adapter():
                assert_same_generation(greedy(adapted, batch, 12), bare)

    def test_adapter_put_on_afterwards(self, tiny_model: Any) -> None:
        """The adapter's layers come into a model that already has a method at work."""
        from peft import LoraConfig, get_peft_model

        model, batch = tiny_model("qwen2"), ragged(40)
        config = LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        with deltakv.apply(model, COVERING) as handle:
            torch.manual_seed(0)
            adapted = get_peft_model(model, config).eval()
            ours, _ = decode(adapted, batch, tokens(5)[None])
            assert handle.stats.steps == 5
        stock, _ = decode(adapted, batch, tokens(5)[None])
        assert_close(ours, stock)


@needs("torchao")
@pytest.mark.filterwarnings("ignore")
def test_int8_weights(tiny_model: Any, tmp_path: Path) -> None:
    """torchao's int8 weight-only quantisation, loaded as transformers loads it."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    model.generation_config.eos_token_id = None
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    batch = ragged(40, 12)
    stock = greedy(model, batch, 8)
    with deltakv.apply(model, COVERING) as handle:
        assert_same_generation(greedy(model, batch, 8), stock)
        assert handle.stats.steps == 7


@needs("accelerate")
def test_device_map(tiny_model: Any, tmp_path: Path) -> None:
    """A model that accelerate has put on its devices, with hooks of its own around every forward."""
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    batch = ragged(40, 12)
    stock = greedy(model, batch, 8)
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 8), stock)


@needs("accelerate")
def test_device_map_with_layers_on_disk(tiny_model: Any, tmp_path: Path) -> None:
    """Weights that accelerate brings in around each layer: several "devices" on a machine that has one."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    batch = ragged(40, 12)
    stock = greedy(model, batch, 8)
    with deltakv.apply(model, COVERING):
        assert_same_generation(greedy(model, batch, 8), stock)


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of two layers, because compiling costs seconds a layer; the compiler starts and ends empty."""
    monkeypatch.undo()  # poisoned memory is Python that dynamo would trace into
    # pytest listens to all loggers, and would get megabytes of compiler traces.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.14,
    )
    yield LlamaForCausalLM(config).eval()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_then_applied(two_layers: Any) -> None:
    """A compiled model that has already run: old code must not be used with the method, nor new code without."""
    model, batch, continuation = two_layers, ragged(90, 40), tokens(6, seed=1).view(2, 3)
    method = deltakv.Delta(**SMALL, plan="SR")
    stock, _ = decode(model, batch, continuation)
    with deltakv.apply(model, method):
        sparse, _ = decode(model, batch, continuation)
    assert not torch.allclose(sparse[0, 1:], stock[0, 1:], atol=1e-2)

    compiled = torch.compile(model, backend="aot_eager")
    assert_close(decode(compiled, batch, continuation)[0], stock)
    with deltakv.apply(compiled, method) as handle:
        assert_close(decode(compiled, batch, continuation)[0], sparse)
        assert handle.stats.sparse_rows == 3
    assert_close(decode(compiled, batch, continuation)[0], stock)


@pytest.mark.filterwarnings("ignore")
def test_applied_and_then_compiled_in_place(two_layers: Any) -> None:
    """`model.compile()` keeps the module and compiles its call; after the handle is gone it is stock code again."""
    model, batch, continuation = two_layers, ragged(90, 40), tokens(6, seed=1).view(2, 3)
    method = deltakv.Delta(**SMALL, plan="SR")
    stock, _ = decode(model, batch, continuation)
    with deltakv.apply(model, method):
        sparse, _ = decode(model, batch, continuation)
        model.compile(backend="aot_eager")
        assert_close(decode(model, batch, continuation)[0], sparse)
    assert_close(decode(model, batch, continuation)[0], stock)


def test_compiled_call_of_generate_does_not_outlive_the_method(tiny_model: Any) -> None:
    """What `generate` compiled before is put aside while a method is at work, and what came since is dropped."""
    model = tiny_model("llama")
    before = model.__dict__["_compiled_call"] = object()
    with deltakv.apply(model, COVERING):
        assert "_compiled_call" not in model.__dict__
        model.__dict__["_compiled_call"] = object()
    assert model.__dict__["_compiled_call"] is before
    del model.__dict__["_compiled_call"]
    with deltakv.apply(model, COVERING):
        model.__dict__["_compiled_call"] = object()
    assert "_compiled_call" not in model.__dict__


def test_threads_share_a_model(model_of: Any) -> None:
    """Several `generate` calls at once on one model, as a small server makes them: right, or refused by name."""
    model, rows = model_of("llama"), [tokens(90, seed=row) for row in range(4)]
    results: list[Any] = [None] * 4

    def generate(index: int) -> None:
        try:
            results[index] = greedy(model, left_padded([rows[index]]), 20)
        except Exception as error:
            results[index] = error

    with deltakv.apply(model, deltakv.Delta(**SMALL)):
        alone = [greedy(model, left_padded([row]), 20) for row in rows]
        threads = [threading.Thread(target=generate, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ours, expected in zip(results, alone, strict=True):
            if isinstance(ours, Exception):
                assert isinstance(ours, deltakv.UnsupportedUseError), repr(ours)
                assert "thread" in str(ours)
            else:
                assert_same_generation(ours, expected)
        # Whatever became of these, the model is in order.
        assert_same_generation(greedy(model, left_padded([rows[0]]), 20), alone[0])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_inference_mode_comes_and_goes(model_of: Any, kind: str) -> None:
    """A cache written inside `torch.inference_mode()` goes on outside of it, and the other way round."""
    model, row = model_of(kind), tokens(300)
    modes = [torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]
    parts = row.split([80, 1, 120, 1, 98])
    with torch.no_grad():
        stock = model(row[None]).logits[0]
    with deltakv.apply(model, COVERING) as handle:
        for first in (0, 1):
            cache, logits = handle.new_cache(), []
            for part, mode in zip(parts, modes[first:] + modes[:first], strict=True):
                with mode():
                    logits.append(model(part[None], past_key_values=cache).logits[0])
            assert_close(torch.cat([part.clone() for part in logits]), stock)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_autocast_is_as_exact_as_stock(model_of: Any, kind: str) -> None:
    """fp32 weights under bf16 autocast, where K comes in fp32 from RoPE and V in bf16 from its projection."""
    model, batch = model_of(kind), ragged(90, 40)
    continuation = torch.stack([tokens(12, seed=row + 3) for row in range(2)])
    reference, _ = decode(model, batch, continuation)
    with torch.autocast("cpu", torch.bfloat16):
        stock, _ = decode(model, batch, continuation)
        with deltakv.apply(model, COVERING):
            ours, _ = decode(model, batch, continuation)
    stock_error, our_error = ((x.float() - reference).abs().mean() for x in (stock, ours))
    assert our_error <= 1.5 * stock_error
