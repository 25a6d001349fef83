"""The integration on real GPUs: run on the device machine (`pytest -m gpu`), never in CI."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltakv
from oracle import DenseDelta

pytestmark = pytest.mark.gpu

KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "opt", "gemma3", "gpt_oss")
SMALL = {"budget": 64, "recent": 16, "sinks": 16, "min_context": 0}


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """fp32 products in fp32: TF32 would hide a wrong result behind its rounding."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def padded_batch(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (2, 200), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def greedy(model: Any, batch: dict[str, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    model.generation_config.eos_token_id = None
    out = model.generate(
        **batch, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    return out.sequences.cpu(), torch.stack(out.logits).float().cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_full_budget_equals_stock(tiny_model: Any, kind: str) -> None:
    model = tiny_model(kind).cuda()
    batch = padded_batch("cuda")
    stock_tokens, stock_logits = greedy(model, batch, 24)
    with deltakv.apply(model, deltakv.Delta(budget=1024, min_context=0)):
        tokens, logits = greedy(model, batch, 24)
    assert torch.equal(tokens, stock_tokens)
    torch.testing.assert_close(logits, stock_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_equals_the_oracle(tiny_model: Any, kind: str) -> None:
    model = tiny_model(kind).cuda()
    row = torch.randint(3, 128, (150,), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad(), deltakv.apply(model, deltakv.Delta(**SMALL, plan=None)) as handle:
        roles = str(handle.plan)
        cache = handle.new_cache(max_length=150)
        model(row[None, :120], past_key_values=cache)
        ours = torch.cat([model(row[None, i : i + 1], past_key_values=cache).logits[0] for i in range(120, 150)])
        assert handle.stats.sparse_rows == (30 if "R" in roles else 0)
    want = DenseDelta(model, roles, page_size=16, **SMALL)(row, 120).logits[120:]
    torch.testing.assert_close(ours.float(), want.float(), atol=1e-4, rtol=0)


def test_evaluation_mode_equals_decoding(tiny_model: Any) -> None:
    model = tiny_model("llama").cuda()
    row = torch.randint(3, 128, (150,), generator=torch.Generator().manual_seed(2)).cuda()
    with torch.no_grad(), deltakv.apply(model, deltakv.Delta(**SMALL)) as handle:
        cache = handle.new_cache()
        model(row[None, :120], past_key_values=cache)
        with handle.positions(recall=True) as trace:
            together = model(row[None, 120:], past_key_values=cache).logits[0]
        cache.crop(-30)
        single = torch.cat([model(row[None, i : i + 1], past_key_values=cache).logits[0] for i in range(120, 150)])
    torch.testing.assert_close(together, single, atol=1e-4, rtol=0)
    assert trace.recall and all(0 < mass <= 1 + 1e-6 for mass in trace.recall.values())


def test_bf16_is_as_exact_as_stock(tiny_model: Any) -> None:
    model, batch = tiny_model("llama").cuda(), padded_batch("cuda")
    with torch.no_grad():
        exact = model(**batch).logits[:, -1].float()
        model.bfloat16()
        stock = (model(**batch).logits[:, -1].float() - exact).abs().max()
        with deltakv.apply(model, deltakv.Full()) as handle:
            cache = handle.new_cache()
            mask = batch["attention_mask"]
            model(batch["input_ids"][:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
            ours = model(
                batch["input_ids"][:, -1:],
                attention_mask=mask,
                past_key_values=cache,
                position_ids=mask.sum(1, keepdim=True) - 1,
            ).logits[:, -1]
    assert stock > 0
    # The stock forward has no position_ids for its padding; compare the row without padding.
    assert (ours[0].float() - exact[0]).abs().max() <= 1.5 * stock


def test_beams_and_a_second_turn(tiny_model: Any) -> None:
    model, batch = tiny_model("llama").cuda(), padded_batch("cuda")
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(**batch, **options)
    with deltakv.apply(model, deltakv.Full()):
        assert torch.equal(model.generate(**batch, **options), stock)
        first = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        more = torch.cat([first.sequences, torch.full((2, 9), 7, device="cuda")], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones((2, 14), dtype=torch.long, device="cuda")], dim=1)
        turn = {"input_ids": more, "attention_mask": mask}
        second = model.generate(
            **turn, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    assert torch.equal(second, model.generate(**turn, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_compiled_by_inductor(tiny_model: Any) -> None:
    model, batch = tiny_model("llama").cuda(), padded_batch("cuda")
    with deltakv.apply(model, deltakv.Delta(**SMALL)):
        tokens, logits = greedy(model, batch, 8)
    model.forward = torch.compile(model.forward)
    with deltakv.apply(model, deltakv.Delta(**SMALL)):
        compiled_tokens, compiled_logits = greedy(model, batch, 8)
    assert torch.equal(compiled_tokens, tokens)
    torch.testing.assert_close(compiled_logits, logits, atol=1e-3, rtol=0)


def test_layers_on_two_gpus(tiny_model: Any, tmp_path: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs (nvidia-h200-x2)")
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path)
    one = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}, dtype=torch.float32)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {
        f"model.layers.{i}": int(i >= one.config.num_hidden_layers // 2) for i in range(one.config.num_hidden_layers)
    }
    two = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, dtype=torch.float32)
    results = []
    for model in (one, two):
        with deltakv.apply(model, deltakv.Delta(**SMALL)) as handle:
            results.append(greedy(model, padded_batch("cuda:0"), 12))
            assert handle.stats.sparse_rows > 0
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=0)
    with deltakv.apply(two, deltakv.Full()):
        tokens, _ = greedy(two, padded_batch("cuda:0"), 12)
    assert torch.equal(tokens, greedy(two, padded_batch("cuda:0"), 12)[0])
