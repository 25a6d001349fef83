"""KL, top-1 and perplexity against the same written out in numpy, on logits that are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakv.evals.fidelity import CHUNK, Reference, measure


class Given:
    """A model whose logits at each position are given, and its cache."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.seen, self.layers = logits, 7, []

    def __call__(self, chunk: Tensor, **_: Any) -> Any:
        start = self.seen - 7
        self.seen += chunk.shape[1]
        return SimpleNamespace(logits=self.logits[None, start : start + chunk.shape[1]])

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        self.seen += tokens_to_remove


def measured(full: Tensor, ours: Tensor, targets: Tensor) -> Any:
    model = Given(ours)
    result = measure(model, model, torch.zeros((1, len(ours)), dtype=torch.long), targets, Reference(full))
    assert model.seen == 7, "cropped back"
    return result


@pytest.mark.parametrize("positions", [5, CHUNK, 2 * CHUNK + 9])
def test_against_numpy(positions: int) -> None:
    generator = torch.Generator().manual_seed(positions)
    full, noise = (torch.randn((positions, 50), generator=generator) * scale for scale in (3, 1))
    targets = torch.randint(0, 50, (positions,), generator=generator)
    result = measured(full, full + noise, targets)

    def probabilities(logits: Tensor) -> np.ndarray:
        weights = np.exp(logits.double().numpy())
        return weights / weights.sum(-1, keepdims=True)

    p, q = probabilities(full), probabilities(full + noise)
    kl = (p * np.log(p / q)).sum(-1)
    assert result.positions == positions
    assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-9)
    assert result.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-9)
    assert kl.mean() < result.kl_p99 < kl.max()
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean()) and 0 < result.top1 < 1
    assert result.perplexity == pytest.approx(np.exp(-np.log(q[np.arange(positions), targets]).mean()), rel=1e-9)


def test_the_same_logits_are_no_distance_apart() -> None:
    """Over a real vocabulary: fp32 probabilities of 49,152 tokens miss 1 by 1e-5, which would pass for a KL."""
    logits = torch.randn((80, 49152), generator=torch.Generator().manual_seed(0)) * 3
    result = measured(logits, logits.clone(), torch.zeros(80, dtype=torch.long))
    assert result.kl_mean < 1e-12 and result.kl_p99 < 1e-12 and result.top1 == 1.0
