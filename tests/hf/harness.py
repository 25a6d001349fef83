"""What the tests of this folder share: batches, decoding by hand, and comparisons of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oracle import DenseDelta, picks_agree

#: Every architecture that `tiny_model` makes.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "opt", "gemma3", "gpt_oss")

#: fp32 logits of two ways to compute the same mathematics.
TOLERANCE = 1e-4

#: DELTA small enough to be sparse in tests: 4 pages, first and last ones included.
SMALL: dict[str, int] = {"budget": 64, "recent": 16, "sinks": 16, "min_context": 0}


def tokens(count: int, seed: int = 0) -> Tensor:
    """int64 [count], none of them a special token."""
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed))


@contextmanager
def failing_layer(model: Any, layer: int = 3) -> Iterator[None]:
    """A context in which every forward fails before that layer, with a RuntimeError "in the middle"."""

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.get_decoder().layers[layer].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def left_padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of rows of different lengths, padding first."""
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def ragged(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of random rows."""
    return left_padded([tokens(length, seed * 100 + index) for index, length in enumerate(lengths)])


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens, as `generate` makes them."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def greedy(model: Any, batch: dict[str, Any], count: int, **options: Any) -> Any:
    """`generate` without chance, with the logits of every step; `.sequences`, `.logits` [steps, batch, vocab]."""
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    out.logits = torch.stack(out.logits)
    return out


def assert_same_generation(ours: Any, stock: Any) -> None:
    """Tokens equal, logits within the tolerance. Logits first: they tell how far off tokens are.

    What a finished row is fed is padding, 0, and no attention is spent on it, so its logits mean nothing.
    """
    assert ours.logits.shape == stock.logits.shape
    steps = len(stock.logits)
    padding = (stock.sequences[:, -steps:].flip(1) != 0).cumsum(1).flip(1) == 0  # from there on to the end
    live = torch.cat([torch.ones_like(padding[:, :1]), ~padding[:, :-1]], dim=1).T  # by the token that is fed
    torch.testing.assert_close(ours.logits[live], stock.logits[live], atol=TOLERANCE, rtol=0)
    assert torch.equal(ours.sequences, stock.sequences)


def assert_close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def decode(model: Any, batch: dict[str, Tensor], continuation: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Prefill of `batch` and one-token forwards over `continuation` [batch, steps], by plain model calls.

    Returns the logits [batch, 1 + steps, vocab] of the last prompt token and of each step, and the cache.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, use_cache=True)
    logits = [out.logits[:, -1]]
    for step in range(continuation.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            continuation[:, step : step + 1],
            attention_mask=mask,
            position_ids=positions(mask)[:, -1:],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1), out.past_key_values


def recorded_picks(handle: Any, row: int = 0) -> dict[int, list[list[int]]]:
    """What `stats.record_picks` wrote down for one row: for each SELECT layer one list of pages a step."""
    picks: dict[int, list[list[int]]] = {}
    for _, layer, pages, n_kept in handle.stats.picks:
        picks.setdefault(layer, []).append(pages[row, : int(n_kept[row])].tolist())
    return picks


def assert_equals_oracle(
    model: Any, method: Any, letters: str, row: Tensor, start: int, logits: Tensor, picks: dict[int, Any]
) -> Any:
    """Logits [T - start, vocab] and picks of the decode positions of `row` from `start` on, against `DenseDelta`.

    Picks may differ only between pages whose scores are equal up to fp32's rounding; logits are compared given the
    same pick. Returns the oracle's run.
    """
    oracle = DenseDelta(
        model,
        letters,
        budget=method.budget,
        recent=method.recent,
        sinks=method.sinks,
        page_size=method.page_size,
        min_context=method.min_context,
    )
    run = oracle(row, start, picks if "S" in letters else None)
    assert sorted(picks) == sorted(run.picks)
    for layer, chosen in picks.items():
        assert len(chosen) == len(run.picks[layer])
        for step, (got, want) in enumerate(zip(chosen, run.picks[layer], strict=True)):
            assert picks_agree(got, want, run.scores[layer][step], 1e-5), (
                f"layer {layer}, position {start + step}: picked {got}, the oracle {want}"
            )
    assert_close(logits, run.logits[start:])
    return run
