"""What a user asks for of the field's other methods: their configs, as `deltakv.config` has DELTA's.

`deltakv/methods/` has a file for each, with its deviations from the paper. Defaults are the papers' where they name
any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from deltakv.config import Budgeted, Method, Sees
from deltakv.errors import ConfigError, PlanError
from deltakv.plan import LayerPlan, Role


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """StreamingLLM (arXiv 2309.17453): the first tokens and the last ones in every layer, whatever the query.

    window: the last tokens; at least one page. sinks: the first tokens; may be 0. Both multiples of `page_size`.
    """

    algorithm: ClassVar[str] = "streaming"
    sees: ClassVar[Sees] = Sees.LENGTHS
    default_plan: ClassVar[str | None] = "first"

    window: int = 1008
    sinks: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pages("window", least=1)
        self._pages("sinks", least=0)

    def kept_pages(self, length: int) -> int:
        return min(super().kept_pages(length), self.recent_pages + self.sink_pages)

    def at_budget(self, pages: int) -> Self | None:
        window = (pages - self.sink_pages) * self.page_size
        return replace(self, window=window) if window > 0 else None

    @property
    def recent_pages(self) -> int:
        return self._pages("window", least=1)

    @property
    def sink_pages(self) -> int:
        return self._pages("sinks", least=0)


@dataclass(frozen=True, kw_only=True)
class Quest(Budgeted):
    """Quest (arXiv 2406.10774): every layer but the first two picks pages by a bound on what they could be worth."""

    algorithm: ClassVar[str] = "quest"
    sees: ClassVar[Sees] = Sees.BOUNDS
    default_plan: ClassVar[str | None] = "quest"

    sinks: int = 0


@dataclass(frozen=True, kw_only=True)
class TidalDecode(Budgeted):
    """TidalDecode (arXiv 2410.05076): two layers pick by their best tokens, all others reuse the pick."""

    algorithm: ClassVar[str] = "tidal"
    default_plan: ClassVar[str | None] = "tidal"

    sinks: int = 0


@dataclass(frozen=True, kw_only=True)
class LessIsMore(Budgeted):
    """LessIsMore (arXiv 2508.07101): the heads' own rankings merged to one pick, a fixed share of it recent.

    recency: the share of the budget that the last tokens get, in place of `recent`, rounded to whole pages; above 0
        (at least a page) and at most 1.
    """

    algorithm: ClassVar[str] = "lessismore"
    by_head: ClassVar[bool] = True
    default_plan: ClassVar[str | None] = "tidal"

    recency: float = 0.25
    sinks: int = 0

    def __post_init__(self) -> None:
        self._share("recency")
        if self.recent != type(self).recent:
            raise ConfigError(f"recent={self.recent!r}: the recent tokens are a share of the budget; give recency=0.25")
        super().__post_init__()

    def at_budget(self, pages: int) -> Self | None:
        try:
            return replace(self, budget=pages * self.page_size)
        except ConfigError:  # no room for sinks beside the recent tokens' share
            return None

    @property
    def recent_pages(self) -> int:
        return max(1, round(self.recency * self.budget_pages))


@dataclass(frozen=True, kw_only=True)
class IndexCache(Budgeted):
    """IndexCache (arXiv 2603.12201): which layers pick is searched for; the others share the pick before theirs.

    The default plan is the paper's plain pattern, one layer in four; `deltakv calibrate --method indexcache` searches.
    """

    algorithm: ClassVar[str] = "indexcache"
    default_plan: ClassVar[str | None] = "interleaved"


@dataclass(frozen=True, kw_only=True)
class Tactic(Budgeted):
    """Tactic (arXiv 2502.12216): as many pages as hold a given share of the attention.

    mass: that share, above 0 and at most 1. budget: the most tokens that may be kept for it.
    """

    algorithm: ClassVar[str] = "tactic"
    by_head: ClassVar[bool] = True

    mass: float = 0.9
    budget: int = 2048
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("mass")

    def keeps_all(self, length: int) -> bool:
        return length <= self.min_context


@dataclass(frozen=True, kw_only=True)
class TokenSelect(Budgeted):
    """TokenSelect (arXiv 2411.02886): in every layer the heads vote; a query like the last one reuses its votes.

    similarity: the cosine between queries above which the last votes stand; 1 has every step vote.
    """

    algorithm: ClassVar[str] = "tokenselect"
    sees: ClassVar[Sees] = Sees.KEYS
    remembers: ClassVar[bool] = True
    by_head: ClassVar[bool] = True
    default_plan: ClassVar[str | None] = "every"

    similarity: float = 0.9
    recent: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("similarity", zero=True)


@dataclass(frozen=True, kw_only=True)
class RefreshKV(Budgeted):
    """RefreshKV (arXiv 2411.05787): full attention now and then, and in between what it has found best.

    stride: the steps after which a layer looks whether its query has drifted; at least 1.
    similarity: the cosine to the query of the last full step above which it has not; 1 refreshes every `stride` steps,
        0 only where the query has turned away.
    """

    algorithm: ClassVar[str] = "refreshkv"
    remembers: ClassVar[bool] = True
    default_plan: ClassVar[str | None] = "every"

    stride: int = 10
    similarity: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("similarity", zero=True)
        if not isinstance(self.stride, int) or isinstance(self.stride, bool) or self.stride < 1:
            raise ConfigError(f"stride={self.stride!r} must be a whole number of steps, 1 or more")

    def select_tokens(self, length: int) -> int:
        kept = self.kept_tokens(length)
        return kept + -(-(length - kept) // self.stride)


@dataclass(frozen=True, kw_only=True)
class Evicting(Budgeted):
    """What methods share that drop pages for good, each layer by what its own queries have seen of them.

    lag: the steps from one eviction to the next, and before the first, since nothing is known of a prompt; at least 1.
        Between evictions a layer holds up to that many tokens more than `budget`.
    Every layer either SELECTs or is FULL, and then keeps everything: there is no pick to reuse, and a WINDOW would hold
    what it never reads again.
    """

    remembers: ClassVar[bool] = True
    evicts: ClassVar[bool] = True
    by_head: ClassVar[bool] = True
    default_plan: ClassVar[str | None] = "every"

    lag: int = 16
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lag, int) or isinstance(self.lag, bool) or self.lag < 1:
            raise ConfigError(f"lag={self.lag!r} must be a whole number of steps, 1 or more")

    def layer_plan(self, depth: int) -> LayerPlan:
        plan = super().layer_plan(depth)
        for role in (Role.REUSE, Role.WINDOW):
            if layers := plan.layers(role):
                raise PlanError(
                    f"method {self.algorithm!r} evicts in each layer by itself, and layer {layers[0]} is {role.name}; "
                    f"make it 'S' (evicts) or 'F' (keeps everything) (plan: {plan})"
                )
        return plan

    def kept_pages(self, length: int) -> int:
        """The most between two evictions."""
        pages = -(-length // self.page_size)
        return pages if length <= self.min_context else min(pages, self.budget_pages + -(-self.lag // self.page_size))

    def select_tokens(self, length: int) -> int:
        return self.kept_tokens(length)


@dataclass(frozen=True, kw_only=True)
class H2O(Evicting):
    """H2O (arXiv 2306.14048): heavy hitters by the attention that they have had so far, and as many recent tokens."""

    algorithm: ClassVar[str] = "h2o"

    recent: int = 512


@dataclass(frozen=True, kw_only=True)
class A2SF(Evicting):
    """A2SF (arXiv 2407.20485): as H2O, with attention that is forgotten as it ages.

    forgetting: what a step leaves of the attention before it, above 0 and at most 1, which is H2O.
    """

    algorithm: ClassVar[str] = "a2sf"

    forgetting: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("forgetting")


@dataclass(frozen=True, kw_only=True)
class LazyEviction(Evicting):
    """LazyEviction (arXiv 2506.15969): drops what has been quiet for long, next to its own longest quiet so far.

    alpha: the attention of a head that makes a page active, above 0 and at most 1.
    """

    algorithm: ClassVar[str] = "lazyeviction"

    alpha: float = 0.001
    lag: int = 128
    recent: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("alpha")
