"""Independent references for the methods beside DELTA: what each means, in plain loops, lists and float64.

Like `oracle.py`, and on top of its dense model, this imports nothing of deltakv. A rule says for one SELECT layer what
each decode position picks, one position after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oracle import DenseDelta, attention, pick


@dataclass
class Choice:
    """A position's pick. scores: behind it, one a page. everything: the layer itself attends to the whole row.
    looked_at: tokens' worth read for the pick, beside what is attended to. due: made at this position, and not
    before."""

    pages: list[int]
    scores: list[float]
    everything: bool = False
    looked_at: int = 0
    due: bool = True


class Rule:
    """A method's rule for one SELECT layer and row; made anew for each, so that it may remember.

    own: the layer attends to its own pick.
    """

    own = True

    def __init__(self, page_size: int, budget: int, recent: int, sinks: int, min_context: int = 0, **more: Any) -> None:
        self.page_size = page_size
        self.limits = (budget // page_size, recent // page_size, sinks // page_size, min_context)
        self.more = more

    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        """q: [n_heads, d], the position's; k: [t, n_kv, d], up to and with its own."""
        raise NotImplementedError

    def pages(self, t: int) -> int:
        return math.ceil(t / self.page_size)

    def best(self, scores: Sequence[float], t: int) -> list[int]:
        return pick(scores, t, self.page_size, *self.limits)

    def by_page(self, values: Sequence[float]) -> list[list[float]]:
        size = self.page_size
        return [list(values[start : start + size]) for start in range(0, len(values), size)]


def probabilities(q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> list[list[float]]:
    """p[h][t] of one query over all of `k`."""
    _, p = attention(q, k, k, torch.ones(len(k), dtype=torch.bool), scale, sinks)
    return p.tolist()


class Streaming(Rule):
    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        n = self.pages(len(k))
        _, window, first, _ = self.limits
        pages = [page for page in range(n) if page < first or page >= n - window]
        return Choice(pages, [float(page in pages) for page in range(n)])


class Quest(Rule):
    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        n, group = self.pages(len(k)), q.shape[0] // k.shape[1]
        bounds = []
        for head in range(q.shape[0]):
            mine = []
            for page in range(n - 1):
                rows = k[page * self.page_size : (page + 1) * self.page_size, head // group].double()
                total = 0.0
                for channel, value in enumerate(q[head].double().tolist()):
                    column = rows[:, channel].tolist()
                    total += max(value * min(column), value * max(column))
                mine.append(total * scale)
            bounds.append(mine)
        scores = [max(mine[page] - max(mine) for mine in bounds) for page in range(n - 1)] + [0.0]
        return Choice(self.best(scores, len(k)), scores, looked_at=n)


class Tidal(Rule):
    own = False

    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        tokens = [max(column) for column in zip(*probabilities(q, k, scale, sinks), strict=True)]
        scores = [max(page) for page in self.by_page(tokens)]
        return Choice(self.best(scores, len(k)), scores)


class IndexCache(Rule):
    own = False

    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        tokens = [max(column) for column in zip(*probabilities(q, k, scale, sinks), strict=True)]
        scores = [sum(page) for page in self.by_page(tokens)]
        return Choice(self.best(scores, len(k)), scores)


class LessIsMore(Rule):
    own = False

    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        n = self.pages(len(k))
        budget, recent, first, _ = self.limits
        middle = range(first, max(n - recent, first))
        rankings = []
        for head in probabilities(q, k, scale, sinks):
            masses = [sum(page) for page in self.by_page(head)]
            rankings.append(sorted(middle, key=lambda page, masses=masses: (-masses[page], page)))
        merged: list[int] = []
        for rank in range(len(middle)):
            for ranking in rankings:
                if ranking[rank] not in merged:
                    merged.append(ranking[rank])
        forced = [page for page in range(n) if page not in middle]
        if n <= budget:
            return Choice(list(range(n)), [0.0] * n)
        chosen = merged[: budget - len(forced)]
        scores = [-float(merged.index(page)) if page in merged else 1.0 for page in range(n)]
        return Choice(sorted(forced + chosen), scores)


class Tactic(Rule):
    own = False

    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        n = self.pages(len(k))
        budget, recent, first, _ = self.limits
        p = probabilities(q, k, scale, sinks)
        scores = [sum(page) for page in self.by_page([sum(column) / len(p) for column in zip(*p, strict=True)])]
        kept = [page for page in range(n) if page < first or page >= n - recent]
        for page in sorted(set(range(n)) - set(kept), key=lambda page: (-scores[page], page)):
            if len(kept) >= budget or sum(scores[page] for page in kept) >= self.more["mass"] * sum(scores):
                break
            kept.append(page)
        return Choice(sorted(kept), scores)


class Remembering(Rule):
    """Scores that stand until they are made anew. `seen`: tokens at the last look."""

    seen = 0
    query: Tensor
    scores: list[float]

    def is_due(self, q: Tensor, t: int) -> bool:
        raise NotImplementedError

    def score(self, p: list[list[float]]) -> list[float]:
        raise NotImplementedError

    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        t = len(k)
        due = self.seen == 0 or self.is_due(q.double(), t)
        if due:
            self.seen, self.query = t, q.double()
            self.scores = self.score(probabilities(q, k, scale, sinks))
        standing = [
            self.scores[page] if (page + 1) * self.page_size <= self.seen else math.inf for page in range(self.pages(t))
        ]
        return self.chosen(self.best(standing, t), standing, due, t)

    def chosen(self, pages: list[int], scores: list[float], due: bool, t: int) -> Choice:
        raise NotImplementedError


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


class TokenSelect(Remembering):
    def is_due(self, q: Tensor, t: int) -> bool:
        return cosine(self.query.flatten(), q.flatten()) <= self.more["similarity"]

    def score(self, p: list[list[float]]) -> list[float]:
        return [sum(page) for page in self.by_page([sum(column) for column in zip(*p, strict=True)])]

    def chosen(self, pages: list[int], scores: list[float], due: bool, t: int) -> Choice:
        return Choice(pages, scores, looked_at=math.ceil(t / 2) if due else 0, due=due)


class RefreshKV(Remembering):
    def is_due(self, q: Tensor, t: int) -> bool:
        like = cosine(self.query.mean(0), q.mean(0))
        return (t - self.seen) % self.more["stride"] == 0 and like <= self.more["similarity"]

    def score(self, p: list[list[float]]) -> list[float]:
        return [sum(page) for page in self.by_page([max(column) for column in zip(*p, strict=True)])]

    def chosen(self, pages: list[int], scores: list[float], due: bool, t: int) -> Choice:
        return Choice(pages, scores, everything=due, due=due)


class Evicting(Rule):
    """What is left of the row's pages, and what its own queries have seen of them."""

    def __init__(self, *args: Any, lag: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self.lag, self.steps, self.gone = lag, 0, set[int]()

    def seen(self, page: int, heads: list[float]) -> None:
        """heads: the attention of each on the page at this step."""
        raise NotImplementedError

    def worth(self, page: int) -> float:
        raise NotImplementedError

    def at(self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> Choice:
        t, n = len(k), self.pages(len(k))
        left = [page for page in range(n) if page not in self.gone]
        visible = torch.tensor([token // self.page_size in left for token in range(t)])
        _, p = attention(q, k, k, visible, scale, sinks)
        size = self.page_size
        self.step({page: p[:, page * size : (page + 1) * size].sum(1).tolist() for page in left}, n)
        return Choice(left, [float(page in left) for page in range(n)])

    def step(self, masses: dict[int, list[float]], n: int) -> None:
        """masses: what each head has put on each page that is left, of `n` with those that are gone."""
        budget, recent, first, _ = self.limits
        left = sorted(masses)
        self.steps += 1
        for page, heads in masses.items():
            self.seen(page, heads)
        if self.steps % self.lag == 0 and n > budget:
            forced = [page for page in left if page < first or page >= n - recent]
            rest = sorted(set(left) - set(forced), key=lambda page: (-self.worth(page), page))
            self.gone |= set(rest[budget - len(forced) :])


class H2O(Evicting):
    forgetting = 1.0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.sums: dict[int, float] = {}

    def seen(self, page: int, heads: list[float]) -> None:
        self.sums[page] = self.sums.get(page, 0.0) * self.forgetting + sum(heads)

    def worth(self, page: int) -> float:
        return self.sums[page]


class A2SF(H2O):
    def __init__(self, *args: Any, forgetting: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.forgetting = forgetting


class LazyEviction(Evicting):
    def __init__(self, *args: Any, alpha: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.alpha = alpha
        self.active: dict[int, list[int]] = {}

    def seen(self, page: int, heads: list[float]) -> None:
        if max(heads) >= self.alpha:
            self.active.setdefault(page, []).append(self.steps)

    def worth(self, page: int) -> float:
        times = self.active.get(page, [])
        if times and times[-1] == self.steps:
            return 0.0
        if len(times) < 2:
            return -math.inf
        return -(self.steps - times[-1]) / max(b - a for a, b in itertools.pairwise(times))


RULES: dict[str, type[Rule]] = {
    "streaming": Streaming,
    "quest": Quest,
    "tidal": Tidal,
    "lessismore": LessIsMore,
    "tactic": Tactic,
    "tokenselect": TokenSelect,
    "refreshkv": RefreshKV,
    "indexcache": IndexCache,
    "h2o": H2O,
    "a2sf": A2SF,
    "lazyeviction": LazyEviction,
}


class DenseMethod(DenseDelta):
    """A method on a stock model by masks alone, as `DenseDelta`. options: those of its `Rule`, in tokens."""

    def __init__(self, model: Any, roles: str, algorithm: str, page_size: int = 16, **options: Any) -> None:
        limits = {name: options.get(name, 0) for name in ("budget", "recent", "sinks", "min_context")}
        super().__init__(model, roles, **limits, page_size=page_size)
        self.rule, self.options = RULES[algorithm], options
        self.due: dict[int, list[bool]] = {}

    def _select(self, layer: int, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> list[bool] | None:
        rule = self.rule(self.page_size, **self.options)
        choices = []
        for position in range(self._start, q.shape[1]):
            choices.append(rule.at(q[:, position], k[:, : position + 1].transpose(0, 1), scale, sinks))
        self._run.scores[layer] = [choice.scores for choice in choices]
        self._run.picks[layer] = [choice.pages for choice in choices]
        self._run.attended += sum(choice.looked_at for choice in choices)
        self.due[layer] = [choice.due for choice in choices]
        self._take(layer, self._run.picks[layer])
        return [choice.everything for choice in choices] if rule.own else None
