"""How far a method's next-token distributions are from full attention's: KL, top-1, perplexity, recall.

Teacher-forced over the last positions of a text, in evaluation mode: each position picks for itself, as if
decoded one at a time. All methods continue the same prefill; the cache is cropped back after each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltakv.bench.runners import Checkpoint

#: Positions a forward: enough to feed the GEMMs, few enough that logits over a large vocabulary stay small.
CHUNK = 64

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Fidelity:
    """Over the evaluated positions, against full attention.

    kl_mean, kl_p99: KL(full || method) in nats. top1: share of positions with the same most likely token.
    perplexity: of the text under the method.
    attended_tokens: summed over layers, mean over positions; None for stock attention, which does not count.
    recall_by_layer: mean over heads and positions of full attention's mass inside the pick or window, by layer index,
    of layers that attend to one.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    attended_tokens: float | None = None
    recall_by_layer: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """Full attention's logits, fp32 [positions, vocabulary], on the model's device: over a large vocabulary they are
    more to move, and to compare on a CPU, than a forward takes on a GPU."""

    logits: Tensor


def reference(model: Any, cache: Any, ids: Tensor, handle: Any, advance: Advance = lambda tokens: None) -> Reference:
    """Full attention over `ids` [1, positions] after what `cache` holds; the cache is left as it was found.

    handle: of `deltakv.Full` on this model.
    """
    with handle.positions():
        return Reference(torch.cat(list(_logits(model, cache, ids, advance))))


@dataclass(frozen=True)
class Differences:
    """A method's next-token distributions beside full attention's, position by position.

    kl: KL(full || method) in nats; agree: the same most likely token; surprise: of the token that follows, in nats,
    under the method. Each [positions], on the CPU.
    """

    kl: Tensor
    agree: Tensor
    surprise: Tensor

    def summary(self, attended_tokens: float | None = None, recall: dict[int, float] | None = None) -> Fidelity:
        """All positions in a few numbers."""
        return Fidelity(
            positions=len(self.kl),
            kl_mean=self.kl.mean().item(),
            kl_p99=self.kl.quantile(0.99).item(),
            top1=self.agree.double().mean().item(),
            perplexity=self.surprise.mean().exp().item(),
            attended_tokens=attended_tokens,
            recall_by_layer=dict(sorted((recall or {}).items())),
        )


def differences(
    model: Any, cache: Any, ids: Tensor, targets: Tensor, against: Reference, advance: Advance = lambda tokens: None
) -> Differences:
    """What the model does now over `ids`; arguments as for `measure`. The cache is left as it was found."""
    divergence, agree, surprise = [], [], []
    start = 0
    for logits in _logits(model, cache, ids, advance):
        stop = start + logits.shape[0]
        # Both in double: over a large vocabulary the probabilities of fp32 miss 1 by more than small KLs are.
        full, ours = (x.double().log_softmax(-1) for x in (against.logits[start:stop], logits))
        divergence.append((full.exp() * (full - ours)).sum(-1).clamp_min(0))
        agree.append(full.argmax(-1) == ours.argmax(-1))
        surprise.append(-ours.gather(-1, targets[start:stop, None].to(ours.device)).squeeze(-1))
        start = stop
    return Differences(*(torch.cat(parts).cpu() for parts in (divergence, agree, surprise)))


def measure(
    model: Any,
    cache: Any,
    ids: Tensor,
    targets: Tensor,
    against: Reference,
    handle: Any = None,
    advance: Advance = lambda tokens: None,
) -> Fidelity:
    """A method over `ids` [1, positions] after what `cache` holds; the cache is left as it was found.

    targets: int64 [positions], the tokens that follow each position.
    handle: of the method on this model; None for stock attention, to which several tokens are as one at a
    time.
    """
    if handle is None:
        return differences(model, cache, ids, targets, against, advance).summary()
    handle.stats.reset()
    with handle.positions(recall=True) as trace:
        found = differences(model, cache, ids, targets, against, advance)
    return found.summary(handle.stats.attended_per_row_step, trace.recall)


def _logits(model: Any, cache: Any, ids: Tensor, advance: Advance) -> Iterator[Tensor]:
    """fp32 logits [positions, vocabulary] of each chunk, on the model's device; crops the cache back at the end."""
    start = Checkpoint(cache)
    try:
        for chunk in ids.split(CHUNK, dim=1):
            out = model(chunk.to(model.device), past_key_values=cache, use_cache=True)
            yield out.logits[0].float()
            advance(chunk.shape[1])
    finally:
        start.restore()
