"""The reference's own footing: hand-made picks, and stock transformers where nothing is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from oracle import NAME, DenseDelta, attention, page_scores, pick, picks_agree


def test_attention_by_hand() -> None:
    """Two heads on one KV head; logits log 1, log 3 and a hidden log 4; a sink of log 4."""
    k = torch.tensor([1.0, 3.0, 4.0]).log().reshape(3, 1, 1)
    v = torch.tensor([[1.0], [2.0], [100.0]]).reshape(3, 1, 1)
    visible = torch.tensor([True, True, False])
    q = torch.tensor([[2.0], [0.0]])
    out, p = attention(q, k, v, visible, 0.5)
    torch.testing.assert_close(p, torch.tensor([[0.25, 0.75, 0], [0.5, 0.5, 0]], dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor([[1.75], [1.5]], dtype=torch.float64))
    out, p = attention(q, k, v, visible, 0.5, sinks=torch.tensor([4.0, 1.0]).log())
    want = torch.tensor([[0.125, 0.375, 0], [1 / 3, 1 / 3, 0]], dtype=torch.float64)
    torch.testing.assert_close(p, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(out, torch.tensor([[0.875], [1.0]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_page_scores_by_hand() -> None:
    """One token to a page's worth: the max over heads at each token, then the sum."""
    k = torch.zeros(3, 2, 1)
    k[0, 0], k[2, 1] = math.log(2), math.log(6)
    scores = page_scores(torch.ones(2, 1), k, 1.0, seq_len=3, page_size=2)
    # head 0: 1/2 1/4 1/4; head 1: 1/8 1/8 6/8
    assert scores == pytest.approx([0.5 + 0.25, 0.75])


def test_picks_by_hand() -> None:
    scores = [0.0, 5.0, 2.0, 5.0, 1.0, 5.0, 0.0, 0.0]

    def kept(seq_len: int, budget: int, recent: int, sinks: int, min_context: int = 0) -> list[int]:
        return pick(scores, seq_len, 16, budget, recent, sinks, min_context)

    assert kept(0, 4, 1, 0) == []
    assert kept(64, 4, 1, 0) == [0, 1, 2, 3], "n <= budget keeps all"
    assert kept(65, 4, 1, 0) == [1, 2, 3, 4], "a page of one token is the recent page"
    assert kept(128, 3, 1, 0) == [1, 3, 7], "ties to the earlier page"
    assert kept(128, 4, 1, 1) == [0, 1, 3, 7]
    assert kept(128, 4, 2, 2) == [0, 1, 6, 7]
    assert kept(128, 4, 1, 0, min_context=128) == list(range(8))
    assert kept(128, 4, 1, 0, min_context=127) == [1, 3, 5, 7]


def test_picks_agree() -> None:
    scores = [0.5, 0.25, 0.2500001, 0.1, 0.0]
    assert picks_agree([0, 2, 4], [0, 2, 4], scores, 0)
    assert picks_agree([0, 1, 4], [0, 2, 4], scores, 1e-6)
    assert not picks_agree([0, 1, 4], [0, 2, 4], scores, 0), "no tolerance, no swap"
    assert not picks_agree([0, 3, 4], [0, 2, 4], scores, 1e-2), "too far"
    assert not picks_agree([0, 2, 3], [0, 2, 4], scores, 1e-2), "a forced page was dropped for a better one"
    assert not picks_agree([0, 2], [0, 2, 4], scores, 1), "too few"
    assert not picks_agree([2, 0, 4], [0, 2, 4], scores, 1), "not ascending"
    assert not picks_agree([0, 2, 2], [0, 2, 4], scores, 1), "twice"
    assert not picks_agree([0, 2, 5], [0, 2, 4], scores, 1), "no such page"
    tied = [1.0, 1.0, 0.0]
    assert not picks_agree([1, 2], [0, 2], tied, 0), "exact ties go to the earlier page"


#: What `tiny_model` makes. (Not imported: several folders have a conftest.py, and all of them have one name.)
KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "opt", "gemma3", "gpt_oss")


def plan_for(model: Any, tail: str = "SRSRRRRR") -> str:
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return ("F" + tail)[: sum(kind != "sliding_attention" for kind in kinds)]


def some_ids(tokens: int) -> torch.Tensor:
    return torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_with_room_for_everything_it_is_stock_attention(kind: str, tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model(kind), some_ids(130)
    run = DenseDelta(model, plan_for(model), budget=1024, recent=16, sinks=0)(ids, start=60)
    for stock in ("eager",) if kind == "gpt_oss" else ("eager", "sdpa"):  # gpt_oss has no sdpa: its sinks
        model.set_attn_implementation(stock)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(run.logits, logits, rtol=0, atol=1e-4)
    assert run.attended == run.full
    assert all(recall == pytest.approx(1) for recall in run.recall.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_budget_shows_in_the_logits(kind: str, tiny_model: Callable[..., Any]) -> None:
    """Prefill is full attention; from `start` on a wrong pick would be seen, since even the right one is."""
    model, ids = tiny_model(kind), some_ids(200)
    plan = plan_for(model)
    full = DenseDelta(model, plan, budget=1024, recent=16, sinks=0)(ids, start=160)
    small = DenseDelta(model, plan, budget=48, recent=16, sinks=16)(ids, start=160)
    torch.testing.assert_close(small.logits[:160], full.logits[:160], rtol=0, atol=1e-5)
    assert ((small.logits - full.logits)[160:].abs().amax(dim=-1) > 1e-2).all()
    other = {layer: [[0, p[1] % (p[-1] - 2) + 1, p[-1]] for p in picks] for layer, picks in small.picks.items()}
    wrong = DenseDelta(model, plan, budget=48, recent=16, sinks=16)(ids, start=160, picks=other)
    assert ((small.logits - wrong.logits)[160:].abs().amax(dim=-1) > 1e-2).all()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss"])
def test_one_forward_is_decoding_one_token_at_a_time(kind: str, tiny_model: Callable[..., Any]) -> None:
    """A longer row never changes what was before it, and the same picks given back give the same logits."""
    model, ids = tiny_model(kind), some_ids(150)
    dense = DenseDelta(model, plan_for(model), budget=48, recent=16, sinks=0)
    run = dense(ids, start=110)
    for end in (111, 113, 128, 129):
        shorter = dense(ids[:end], start=110)
        torch.testing.assert_close(shorter.logits, run.logits[:end], rtol=0, atol=1e-4)
        for layer, picks in shorter.picks.items():
            for got, want, scores in zip(picks, run.picks[layer], run.scores[layer], strict=False):
                assert picks_agree(got, want, scores, 1e-5)
    given = dense(ids, start=110, picks=run.picks)
    assert torch.equal(given.logits, run.logits)


def test_what_is_attended_is_counted(tiny_model: Callable[..., Any]) -> None:
    """Two decode positions, 101 and 102 tokens: 7 pages, the last with 5 and 6 tokens; one REUSE layer."""
    run = DenseDelta(tiny_model("llama"), "FFFFSR", budget=48, recent=16, sinks=0)(some_ids(102), start=100)
    assert run.full == 6 * (101 + 102)
    assert run.attended == 5 * (101 + 102) + (32 + 5) + (32 + 6)
    assert [len(pages) for pages in run.picks[4]] == [3, 3]
    assert all(pages[-1] == 6 for pages in run.picks[4]) and 0 < run.recall[5] < 1


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    dense = DenseDelta(model, "FSRRRR", budget=32, recent=16, sinks=0)
    dense(some_ids(40), start=30)
    with pytest.raises(AssertionError):
        DenseDelta(model, "FRRRRR", budget=32, recent=16, sinks=0)(some_ids(40), start=30)
    assert model.config._attn_implementation == before != NAME
    assert NAME not in AttentionInterface._global_mapping and NAME not in AttentionMaskInterface._global_mapping


def test_fresh_memory_is_poisoned() -> None:
    like = torch.zeros(3)
    for tensor in (
        torch.empty(3),
        torch.empty_like(like),
        like.new_empty(3),
        torch.empty_strided((3,), (1,)),
    ):
        assert tensor.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
