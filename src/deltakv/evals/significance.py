"""How sure a result on some questions is: intervals, and paired tests against full attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Interval = tuple[float, float]

#: Of the normal distribution, for 95%.
_Z = 1.959963984540054
RESAMPLES = 10_000


def wilson(right: int, count: int) -> Interval:
    """95% interval of a share (Wilson 1927), `right` of `count`."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: questions that one alone got right fall to either side like a coin."""
    count, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return float(min(1.0, 2 * tail / 2**count))


def newcombe(scores: Sequence[float], base: Sequence[float]) -> Interval:
    """95% interval of the difference of two shares of the same questions (Newcombe 1998, method 10), scores 0 or 1.

    Unlike the bootstrap it does not shrink to nothing where no question of a handful has changed sides.
    """
    count = len(scores)
    pairs = [(int(ours), int(theirs)) for ours, theirs in zip(scores, base, strict=True)]
    both, ours_only, theirs_only, neither = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    right, right_base = both + ours_only, both + theirs_only
    spread = math.sqrt(right * (count - right) * right_base * (count - right_base))
    together = both * neither - ours_only * theirs_only
    corrected = max(together - count / 2, 0) if together > 0 else together
    correlation = corrected / spread if spread else 0.0
    (low, high), (low_base, high_base) = wilson(right, count), wilson(right_base, count)
    share, share_base = right / count, right_base / count

    def length(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0))

    below, above = length(share - low, high_base - share_base), length(high - share, share_base - low_base)
    return share - share_base - below, share - share_base + above


def bootstrap(
    columns: Sequence[Sequence[float]],
    statistic: Callable[..., Any] = lambda column: column,
    resamples: int = RESAMPLES,
) -> Interval:
    """95% interval (percentiles) of a statistic of the columns' means, over questions drawn with replacement.

    columns: one or more numbers a question, each column a sequence over the same questions, so that what belongs to
    a question is drawn together. statistic: of arrays of means, one a column; the mean itself by default. The draws
    are the same for the same number of questions.
    """
    values = np.asarray(columns, dtype=float)
    count = values.shape[1]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(0, resamples, 500):  # a piece at a time: [500, questions]
        weights = rng.multinomial(count, np.full(count, 1 / count), size=500) / count
        found.append(statistic(*(weights @ values.T).T))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def accuracy(scores: Sequence[float]) -> dict[str, Any]:
    """Mean and its interval: Wilson's where every score is 0 or 1, the bootstrap's where answers can be half right."""
    whole = all(score in (0, 1) for score in scores)
    interval = wilson(round(sum(scores)), len(scores)) if whole else bootstrap([scores])
    return {"accuracy": sum(scores) / len(scores), "interval": list(interval)}


def paired(scores: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """The difference to `base` on the same questions, and its bootstrap interval. Where every score is 0 or 1 the
    interval is Newcombe's instead, and McNemar's test comes with it."""
    differences = [ours - theirs for ours, theirs in zip(scores, base, strict=True)]
    said: dict[str, Any] = {
        "difference": sum(differences) / len(differences),
        "bootstrap": list(bootstrap([differences])),
        "better": sum(difference > 0 for difference in differences),
        "worse": sum(difference < 0 for difference in differences),
    }
    whole = all(score in (0, 1) for score in [*scores, *base])
    said["interval"] = list(newcombe(scores, base)) if whole else said["bootstrap"]
    said["p"] = mcnemar(said["worse"], said["better"]) if whole else None
    return said


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """Perplexity over all tokens, its interval over texts. losses: nats of each text; tokens: that it has."""

    def of(loss: Any, count: Any) -> Any:
        return np.exp(loss / count)

    return {"perplexity": math.exp(sum(losses) / sum(tokens)), "interval": list(bootstrap([losses, tokens], of))}


def paired_perplexity(losses: Sequence[float], base: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """How many times `base`'s perplexity it is, on the same texts."""

    def of(ours: Any, theirs: Any, count: Any) -> Any:
        return np.exp((ours - theirs) / count)

    ratio = math.exp((sum(losses) - sum(base)) / sum(tokens))
    return {"ratio": ratio, "interval": list(bootstrap([losses, base, tokens], of))}
