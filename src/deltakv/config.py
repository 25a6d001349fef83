"""What a user asks for: one frozen dataclass a method, told apart by `algorithm`, validated on creation.

Budgets are given in tokens and count whole pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltakv.errors import ConfigError
from deltakv.plan import LayerPlan, PlanSpec, resolve

PAGE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods share.

    page_size: tokens a KV page, one of 16, 32, 64, 128.
    plan: a `LayerPlan`, a preset's name, one letter a layer, a file, or None for the default by depth.
    """

    algorithm: ClassVar[str]

    page_size: int = 16
    plan: PlanSpec = None

    def __post_init__(self) -> None:
        if type(self.page_size) is not int or self.page_size not in PAGE_SIZES:
            raise ConfigError(f"page_size={self.page_size!r} is not one of {PAGE_SIZES}")

    def layer_plan(self, depth: int) -> LayerPlan:
        """The plan for a model with `depth` layers to plan. Raises `PlanError` if there is none."""
        return resolve(self.plan, depth)

    def kept_pages(self, length: int) -> int:
        """Pages that a REUSE layer reads of a row of `length` tokens; all, unless the method says less."""
        return -(-length // self.page_size)

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
class Delta(Method):
    """DELTA (arXiv 2510.09883): Δ-layers attend in full and pick the pages that all later layers attend to.

    budget: tokens a REUSE layer attends to, sinks and recent ones included.
    recent: the last tokens, always kept; at least one page.
    sinks: the first tokens, always kept; may be 0 (as in the paper).
    min_context: a row of at most that many tokens stays dense, because there sparse gains nothing.
    `budget`, `recent` and `sinks` are multiples of `page_size`. Raises `ConfigError` if they do not hold together.
    """

    algorithm: ClassVar[str] = "delta"

    budget: int = 1024
    recent: int = 128
    sinks: int = 16
    min_context: int = 2048

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

    @property
    def budget_pages(self) -> int:
        return self._pages("budget", least=1)

    @property
    def recent_pages(self) -> int:
        return self._pages("recent", least=1)

    @property
    def sink_pages(self) -> int:
        return self._pages("sinks", least=0)
