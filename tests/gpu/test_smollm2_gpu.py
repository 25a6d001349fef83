"""Real text through SmolLM2 in bf16 on a GPU: every op call beside the naive one, and logits beside fp32.

Run on the device machine, never in CI. Its package cannot be fetched there: SMOLLM2 names the GGUF file.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import deltakv
from deltakv.evals.texts import builtin_text
from deltakv.loading.model import load_model, load_tokenizer
from deltakv.loading.source import locate
from deltakv.ops.decode_attention import naive
from deltakv.ops.page_scores.naive import page_scores as naive_scores
from oracle import picks_agree

pytestmark = [pytest.mark.gpu, pytest.mark.model]

SPARSE = deltakv.Delta(budget=512, recent=64, sinks=16, min_context=0)
#: What two ways to add up bf16 products of unit size may differ by.
ROUNDING = 2.0**-7


@pytest.fixture(scope="module")
def path() -> str:
    return locate(os.environ.get("SMOLLM2", "smollm2"))


@pytest.fixture(scope="module")
def ids(path: str) -> Tensor:
    ids: Tensor = load_tokenizer(path)(builtin_text()[:30_000], return_tensors="pt").input_ids
    return ids


def test_every_op_is_as_the_naive_one(path: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltakv.integrations.hf import attention
    from deltakv.methods import delta

    model = load_model(path, "bfloat16", "cuda")
    model.generation_config.eos_token_id = None
    calls = {"attention": 0, "statistics": 0, "picks": 0}
    attend, attend_stats, score, select = (
        attention.decode_attention, attention.decode_attention_stats, delta.page_scores, delta.select_pages
    )  # fmt: skip

    def checked_attention(*args: Any) -> Tensor:
        out = attend(*args)
        torch.testing.assert_close(out, naive.decode_attention(*args), atol=ROUNDING, rtol=ROUNDING)
        calls["attention"] += 1
        return out

    def checked_stats(*args: Any) -> Any:
        out, logits, peaks, lse = attend_stats(*args)
        want, _, _, want_lse = naive.decode_attention_stats(*args)
        torch.testing.assert_close(out, want, atol=ROUNDING, rtol=ROUNDING)
        torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-4)
        calls["statistics"] += 1
        naive_logits = naive.decode_attention_stats(*args)[1:]
        exact.append(naive_scores(*naive_logits, args[4][:, 0], 16))
        return out, logits, peaks, lse

    def checked_select(scores: Tensor, seq_lens: Tensor, *limits: Any) -> Any:
        pages, n_kept = select(scores, seq_lens, *limits)
        want, want_kept = select(exact[-1][:, : scores.shape[1]], seq_lens, *limits)
        for row in range(len(pages)):
            got = pages[row, : int(n_kept[row])].tolist()
            right = exact[-1][row].tolist()
            assert picks_agree(got, want[row, : int(want_kept[row])].tolist(), right, 20 * 2.0**-11 * max(right))
        calls["picks"] += 1
        return pages, n_kept

    exact: list[Tensor] = []
    monkeypatch.setattr(attention, "decode_attention", checked_attention)
    monkeypatch.setattr(attention, "decode_attention_stats", checked_stats)
    monkeypatch.setattr(delta, "select_pages", checked_select)
    assert score is delta.page_scores
    prompt = torch.stack([ids[0, :3000], ids[0, 1000:4000]]).cuda()
    mask = torch.ones_like(prompt)
    mask[1, :1700] = 0
    with deltakv.apply(model, SPARSE) as handle:
        model.generate(
            prompt, attention_mask=mask, max_new_tokens=17, do_sample=False, pad_token_id=0, disable_compile=True
        )
        letters = str(handle.plan)
        assert handle.stats.sparse_rows == 2 * 16
    dense = letters.count("F") + letters.count("R")
    assert calls == {"attention": 16 * dense, "statistics": 16 * letters.count("S"), "picks": 16 * letters.count("S")}


def test_generate_in_bf16_is_as_exact_as_stock(path: str, ids: Tensor) -> None:
    """A budget that covers the context: no further from fp32 than 1.5 times stock's own rounding."""
    prompt, steps = ids[:, :2000].cuda(), 64
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"max_new_tokens": steps, "min_new_tokens": steps, "pad_token_id": 0}
    model = load_model(path, "bfloat16", "cuda")
    with deltakv.apply(model, deltakv.Delta(budget=4096, min_context=0)) as handle:
        ours = model.generate(prompt, **options)
        assert handle.stats.sparse_rows == 0
    with torch.no_grad():
        row = ours.sequences
        stock = model(row, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
        exact_model = load_model(path, "float32", "cuda")
        exact = exact_model(row, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    got = torch.stack(ours.logits)[:, 0].float()
    assert (got - exact).abs().mean() <= 1.5 * (stock - exact).abs().mean()


def test_sparse_in_bf16_follows_sparse_in_fp32(path: str, ids: Tensor) -> None:
    """Teacher-forced: DELTA in bf16, captured, beside DELTA in fp32, by the KL of their next tokens."""
    row, steps = ids[:, :3064].cuda(), 64
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(path, dtype, "cuda")
        with torch.no_grad(), deltakv.apply(model, SPARSE) as handle:
            cache = handle.new_cache(3200, static=True)
            model(row[:, :-steps], past_key_values=cache)
            step = torch.compile(
                lambda token: model(token, past_key_values=cache).logits[:, -1],  # noqa: B023  used in this round only
                mode="reduce-overhead", fullgraph=True,
            )  # fmt: skip
            logits = []
            for index in range(3000, 3064):
                handle.announce(cache)
                logits.append(step(row[:, index : index + 1]).double().log_softmax(-1))
            assert handle.stats.sparse_rows == steps
        found[dtype] = torch.cat(logits)
    kl = (found["float32"].exp() * (found["float32"] - found["bfloat16"])).sum(-1)
    with torch.no_grad():
        models = [load_model(path, dtype, "cuda") for dtype in ("float32", "bfloat16")]
        stock = [model(row, use_cache=False).logits[0, 3000:].double().log_softmax(-1) for model in models]
    stock_kl = (stock[0].exp() * (stock[0] - stock[1])).sum(-1)
    # A page at the edge of the pick may go the other way in bf16, which stock has not: hence more than 1.5 times.
    assert kl.mean() <= 5 * stock_kl.mean() + 1e-3, (float(kl.mean()), float(stock_kl.mean()))
