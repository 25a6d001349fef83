"""Intervals and tests against published figures, and against the same by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deltakv.evals import significance as s


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_figures(right: int, count: int, low: float, high: float) -> None:
    assert s.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert s.wilson(count - right, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_mcnemar_by_counting_coins() -> None:
    for first, second in itertools.product(range(6), repeat=2):
        flips = list(itertools.product((0, 1), repeat=first + second))
        far = sum(abs(2 * sum(flip) - len(flip)) >= abs(first - second) for flip in flips)
        assert s.mcnemar(first, second) == pytest.approx(far / len(flips))
    assert s.mcnemar(1, 5) == pytest.approx(0.21875)


@pytest.mark.parametrize(
    ("both", "ours", "theirs", "neither", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 2635-2650, table II, method 10.
    [(36, 12, 2, 0, 0.0569, 0.3404), (36, 14, 0, 0, 0.1528, 0.4167), (0, 0, 0, 54, -0.0664, 0.0664)],
)
def test_newcombe_against_published_figures(
    both: int, ours: int, theirs: int, neither: int, low: float, high: float
) -> None:
    pairs = [(1, 1)] * both + [(1, 0)] * ours + [(0, 1)] * theirs + [(0, 0)] * neither
    scores, base = zip(*pairs, strict=True)
    assert s.newcombe(scores, base) == pytest.approx((low, high), abs=5e-5)
    assert s.newcombe(base, scores) == pytest.approx((-high, -low), abs=5e-5)


def test_bootstrap_of_a_mean_is_as_wide_as_its_error() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = s.bootstrap([values])
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert s.bootstrap([values]) == (low, high), "the same draws each time"


def test_paired_keeps_questions_together() -> None:
    """Scores that vary much, and differ by little: the pairs know, two samples apart would not."""
    base = np.random.default_rng(2).uniform(0, 1, size=200)
    said = s.paired((base - 0.01).tolist(), base.tolist())
    assert said["difference"] == pytest.approx(-0.01) and said["p"] is None
    assert said["interval"] == pytest.approx([-0.01, -0.01])
    assert (said["better"], said["worse"]) == (0, 200)


def test_paired_of_right_and_wrong() -> None:
    ours, base = [1, 1, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1]
    said = s.paired(ours, base)
    assert said["difference"] == pytest.approx(-2 / 6)
    assert (said["better"], said["worse"]) == (1, 3) and said["p"] == pytest.approx(s.mcnemar(3, 1))
    assert tuple(said["interval"]) == s.newcombe(ours, base)
    same = s.paired([1, 0], [1, 0])
    assert same["bootstrap"] == [0, 0] and same["interval"][0] < -0.3, "two questions prove nothing"


def test_accuracy_says_which_interval() -> None:
    assert s.accuracy([1, 0, 1, 1]) == {"accuracy": 0.75, "interval": list(s.wilson(3, 4))}
    half = s.accuracy([0.5] * 10)
    assert half["accuracy"] == 0.5 and half["interval"] == pytest.approx([0.5, 0.5])


def test_perplexity_weighs_texts_by_their_tokens() -> None:
    losses, base, tokens = [60.0, 20.0], [58.0, 20.0], [10, 20]
    assert s.perplexity(losses, tokens)["perplexity"] == pytest.approx(np.exp(80 / 30))
    low, high = s.perplexity(losses, tokens)["interval"]
    assert (low, high) == pytest.approx((np.exp(1), np.exp(6)))
    said = s.paired_perplexity(losses, base, tokens)
    assert said["ratio"] == pytest.approx(np.exp(2 / 30)) and said["interval"] == pytest.approx([1, np.exp(0.2)])
