"""What the tests of decode steps that keep their books on the device share: settings, counts, and a talk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

import deltakv
from hf.harness import SMALL, assert_close, greedy, positions, tokens

#: Architectures without a sliding window: all their steps can be announced.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "opt")

COVERING = deltakv.Delta(budget=1024, min_context=0)
SPARSE = deltakv.Delta(**SMALL, plan="FSRRSR")


def counted(handle: Any) -> tuple[int, ...]:
    stats = handle.stats
    return stats.steps, stats.rows, stats.sparse_rows, stats.attended_tokens, stats.full_tokens, stats.kv_bytes


def lengths(cache: Any) -> list[int]:
    return [row.length for row in cache.kv.rows]


def an_end(model: Any, batch: dict[str, Tensor], steps: int = 20) -> tuple[int, list[int]]:
    """A token that some rows make in that many steps and others do not, a third of the way if possible; and how many
    tokens each row makes until it has made that one, or to the last step."""
    new = greedy(model, batch, steps).sequences[:, batch["input_ids"].shape[1] :].tolist()
    made = {
        token: [row.index(token) + 1 if token in row else steps for row in new]
        for token in range(128)
        if 0 < sum(token in row for row in new) < len(new)
    }
    end = min(made, key=lambda token: abs(min(made[token]) - steps // 3))
    assert 1 < min(made[end]) < steps - 2
    return end, made[end]


class Looking(StoppingCriteria):
    """Stops nothing, and calls `look` with the number of columns."""

    def __init__(self, look: Callable[[int], Any]) -> None:
        self._look = look

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._look(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Talk:
    """A batch under plain calls, each compared with a forward of the model over all its tokens, without a cache."""

    def __init__(self, model: Any, reference: Any, handle: Any, batch: dict[str, Tensor], cache: Any) -> None:
        self.model, self.handle, self.cache = model, handle, cache
        self._reference = reference
        width = batch["input_ids"].shape[1]
        self.ids, self.mask = batch["input_ids"][:, :0], batch["attention_mask"][:, :0]
        self.say(batch["input_ids"], real=batch["attention_mask"])
        assert self.ids.shape[1] == width

    def say(self, new: Tensor, *, real: Tensor | None = None, masked: bool = True, announce: bool = False) -> None:
        """A forward of `new`. real: their mask. masked: give the mask."""
        self.ids = torch.cat([self.ids, new], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(new) if real is None else real], dim=1)
        options: dict[str, Any] = {}
        if masked:
            options = {"attention_mask": self.mask, "position_ids": positions(self.mask)[:, -new.shape[1] :]}
        if announce:
            assert self.handle.announce(self.cache)
        logits = self.model(new, past_key_values=self.cache, **options).logits[:, -1]
        with torch.no_grad():
            want = self._reference(
                self.ids, attention_mask=self.mask, position_ids=positions(self.mask), use_cache=False
            )
        assert_close(logits, want.logits[:, -1])
        assert int(self.cache.get_seq_length()) == self.ids.shape[1]

    def steps(self, count: int, **options: Any) -> None:
        for _ in range(count):
            self.say(tokens(len(self.ids), seed=self.ids.shape[1])[:, None], **options)

    def rows(self, indices: list[int]) -> None:
        self.ids, self.mask = self.ids[indices], self.mask[indices]

    def drop(self, columns: int) -> None:
        self.ids, self.mask = self.ids[:, :-columns], self.mask[:, :-columns]
