"""What a user asks for: one frozen dataclass a method, told apart by `algorithm`, validated on creation.

Budgets are given in tokens and count whole pages.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from deltakv.errors import ConfigError, PlanError
from deltakv.plan import LayerPlan, PlanSpec, Role, resolve

PAGE_SIZES = (16, 32, 64, 128)


class Sees(enum.Enum):
    """What the pick of a SELECT layer rests on: this settles when the layer picks, and what it reads."""

    SOFTMAX = "softmax"  #: its own attention over the whole row: it attends in full, and picks afterwards
    KEYS = "keys"  #: its query on all K: it picks first, and attends to its pick
    BOUNDS = "bounds"  #: the least and the greatest K of each page: it picks first, and attends to its pick
    LENGTHS = "lengths"  #: how long the row is, and no more: it picks first, and attends to its pick


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods share.

    page_size: tokens a KV page, one of 16, 32, 64, 128.
    plan: a `LayerPlan`, a preset's name, one letter a layer, a file, or None for the method's own default by depth.
    sees: what its SELECT layers pick by. remembers: whether a pick outlives its step, so that rows have a past of
        queries beside that of K and V. evicts: whether pages that were dropped once never come back. by_head: whether
        the pick needs what each head sees apart, and so all heads in one place. windows: whether layers of its plan may
        be WINDOW, which takes a fixed budget. default_plan: the preset that `plan=None` means.
    """

    algorithm: ClassVar[str]
    sees: ClassVar[Sees] = Sees.SOFTMAX
    remembers: ClassVar[bool] = False
    evicts: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    default_plan: ClassVar[str | None] = None

    page_size: int = 16
    plan: PlanSpec = None

    def __post_init__(self) -> None:
        if type(self.page_size) is not int or self.page_size not in PAGE_SIZES:
            raise ConfigError(f"page_size={self.page_size!r} is not one of {PAGE_SIZES}")

    def layer_plan(self, depth: int) -> LayerPlan:
        """The plan for a model with `depth` layers to plan. Raises `PlanError` if there is none, or not for this
        method."""
        plan = resolve(self.default_plan if self.plan is None else self.plan, depth)
        if not self.windows and (layers := plan.layers(Role.WINDOW)):
            raise PlanError(
                f"method {self.algorithm!r} has no budget that a WINDOW layer could read, and layer {layers[0]} is "
                f"one; allowed are F, S and R (plan: {plan})"
            )
        return plan

    @property
    def attends_to_own_pick(self) -> bool:
        """Whether a SELECT layer attends to what it has picked, and not to everything."""
        return self.sees is not Sees.SOFTMAX or self.remembers

    def kept_pages(self, length: int) -> int:
        """Pages that a REUSE or WINDOW layer reads of a row of `length` tokens; all, unless the method says less."""
        return -(-length // self.page_size)

    def keeps_all(self, length: int) -> bool:
        """Whether no row of up to `length` tokens can lose a page."""
        return self.kept_pages(length) == -(-length // self.page_size)

    def kept_tokens(self, length: int) -> int:
        """Tokens on these pages: whole pages, but the last one of the text may be partly filled."""
        return self.kept_pages(length) * self.page_size - -length % self.page_size

    def select_tokens(self, length: int) -> int:
        """What a SELECT layer reads of a row of `length` tokens, in tokens' worth of K and V (K alone is half a
        token's, the bounds of a page are one token's). On average over steps, for methods that do not pick in each."""
        if self.sees is Sees.SOFTMAX:
            return length
        looked_at = {Sees.KEYS: -(-length // 2), Sees.BOUNDS: -(-length // self.page_size), Sees.LENGTHS: 0}
        return self.kept_tokens(length) + looked_at[self.sees]

    def at_budget(self, pages: int) -> Self | None:
        """The same with a budget of that many pages; None if they are too few, or the method has no budget."""
        return None

    def _share(self, name: str, *, zero: bool = False) -> None:
        """Raises `ConfigError` if the field `name` is not a number above 0 (`zero`: or 0) and at most 1."""
        share = getattr(self, name)
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not (0 < share <= 1 or (zero and share == 0)):
            raise ConfigError(f"{name}={share!r} must be a number {'from 0' if zero else 'above 0'} to 1")

    def _pages(self, name: str, least: int) -> int:
        """The field `name` in whole pages. Raises `ConfigError` if it is not a whole number of at least `least`."""
        tokens = getattr(self, name)
        if not isinstance(tokens, int) or isinstance(tokens, bool):
            raise ConfigError(f"{name}={tokens!r} must be a whole number of tokens")
        if tokens % self.page_size:
            below = tokens - tokens % self.page_size
            raise ConfigError(
                f"{name}={tokens} is not a multiple of the page size {self.page_size}; "
                f"the nearest are {below} and {below + self.page_size}"
            )
        if tokens < least * self.page_size:
            raise ConfigError(f"{name}={tokens} must be at least {least * self.page_size} tokens ({least} pages)")
        return tokens // self.page_size


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """The same machinery with full attention in every layer: the fair baseline.

    Its `plan` is fixed; `page_size` as in `Method`.
    """

    algorithm: ClassVar[str] = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan is not None:
            raise ConfigError("Full() reads every layer in full and takes no plan; use Delta(plan=...)")

    def layer_plan(self, depth: int) -> LayerPlan:
        return resolve("full", depth)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Method):
    """What methods share that keep sinks, recent tokens and the best of the rest.

    budget: tokens that a sparse layer attends to, sinks and recent ones included. A WINDOW layer attends to as many:
        the sinks, and no others than recent ones.
    recent: the last tokens, always kept; at least one page, that of the current token.
    sinks: the first tokens, always kept; may be 0.
    min_context: a row of at most that many tokens stays dense.
    `budget`, `recent` and `sinks` are multiples of `page_size`. Raises `ConfigError` if they do not hold together.
    """

    windows: ClassVar[bool] = True

    budget: int = 1024
    recent: int = 16
    sinks: int = 16
    min_context: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent_pages + self.sink_pages > self.budget_pages:
            raise ConfigError(
                f"recent={self.recent} and sinks={self.sinks} do not fit into budget={self.budget}; "
                f"raise the budget to at least {self.recent + self.sinks} or lower them"
            )
        if not isinstance(self.min_context, int) or isinstance(self.min_context, bool) or self.min_context < 0:
            raise ConfigError(f"min_context={self.min_context!r} must be a whole number of tokens, 0 or more")

    def kept_pages(self, length: int) -> int:
        pages = super().kept_pages(length)
        return pages if length <= self.min_context else min(pages, self.budget_pages)

    def at_budget(self, pages: int) -> Self | None:
        """With fewer recent tokens, where they would be more than half of what sinks leave; None if that is less than
        two pages."""
        if pages < self.sink_pages + 2:
            return None
        recent = min(self.recent_pages, max(1, (pages - self.sink_pages) // 2))
        return replace(self, budget=pages * self.page_size, recent=recent * self.page_size)

    @property
    def budget_pages(self) -> int:
        return self._pages("budget", least=1)

    @property
    def recent_pages(self) -> int:
        return self._pages("recent", least=1)

    @property
    def sink_pages(self) -> int:
        return self._pages("sinks", least=0)


@dataclass(frozen=True, kw_only=True)
class Delta(Budgeted):
    """DELTA (arXiv 2510.09883): Δ-layers attend in full and pick the pages that all later layers attend to.

    budget: tokens a REUSE or WINDOW layer attends to, sinks and recent ones included.
    recent: the last tokens, always kept; at least one page.
    sinks: the first tokens, always kept; may be 0 (as in the paper).
    min_context: a row of at most that many tokens stays dense, because there sparse gains nothing.
    `budget`, `recent` and `sinks` are multiples of `page_size`. Raises `ConfigError` if they do not hold together.
    """

    algorithm: ClassVar[str] = "delta"

    recent: int = 128
    min_context: int = 2048
