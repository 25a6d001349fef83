"""`deltakv calibrate`: the best plan for a cost, by KL to full attention on some text, confirmed on other text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltakv.config import Method
from deltakv.errors import ConfigError, InputError
from deltakv.evals.journal import remove_whole, write_whole
from deltakv.evals.paid import Paid
from deltakv.evals.plan_search import readers, search_plan
from deltakv.evals.windows import Window, interval, measure_windows
from deltakv.field import IndexCache
from deltakv.methods import indexcache
from deltakv.plan import DEFAULT_PRESET, LayerPlan, Role, every

Advance = Callable[[int], None]

#: What is tried once the plan stands, one after the other, at the same budget.
KNOBS = {"recent": (32, 64, 128, 256, 512), "sinks": (0, 16, 32, 64)}


class Tried:
    """Losses that were measured, by what they are of, kept in a file: a search that is started again finds them there.

    header: what they depend on; a file of another run is refused. The file is written anew, whole, after each one.
    times: what a clock said, if it was asked.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self.losses: dict[str, float] = {}
        self.times: dict[str, Any] | None = None
        self._header = json.loads(json.dumps(header))
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                same = kept["header"] == self._header
                self.losses, self.times = dict(kept["losses"]), kept["times"]
            except (OSError, ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path} is not the state of a calibration; delete it, or name another --state"
                ) from None
            if not same:
                raise InputError(
                    f"{path} holds a calibration with another model, text or options; give the same ones to go on with "
                    "it, delete it to begin anew, or name another --state"
                )

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The loss of `key`, measured now if it never was."""
        if key not in self.losses:
            self.losses[key] = measure()
            self._write()
        return self.losses[key]

    def timed(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Times as JSON has them, measured now if they never were: what fits the cost follows from them, and a clock
        never says the same twice."""
        if self.times is None:
            self.times = json.loads(json.dumps(measure()))
            self._write()
        return self.times

    def _write(self) -> None:
        write_whole(self._path, json.dumps({"header": self._header, "times": self.times, "losses": self.losses}))

    def forget(self) -> None:
        """The calibration is done and stands elsewhere."""
        remove_whole(self._path)


@dataclass
class Calibration:
    """One search. base: the method, with what it begins with; its plan and budget are what is searched for.

    paid: what a step may cost. readings: how many layers may read everything: the more of them, the less is left for
    the others. quick: positions of each window that a first look takes. advance: told of every loss that is measured.
    """

    model: Any
    base: Method
    paid: Paid
    readings: Sequence[int]
    windows: Sequence[Window]
    quick: int
    tried: Tried
    advance: Advance = field(default=lambda count: None)

    def run(self) -> Method:
        """The best setting found."""
        own = self.base.attends_to_own_pick
        if isinstance(self.base, IndexCache):
            plan = self._pattern(self.base)
        else:
            plan = search_plan(self.paid.depth, self.readings, self._loss_of_plan, self._begin(), own_picks=own)
        best = self._with(plan)
        assert best is not None, "readings that leave no budget are not searched"
        for name, values in KNOBS.items():
            others = [self._changed(best, name, value) for value in values]
            best = min([best, *filter(None, others)], key=lambda method: self._loss(method, True))
        return best

    def _pattern(self, base: IndexCache) -> LayerPlan:
        """By the paper's own search: of the plans on its way that cost enough, the best. It looks quickly, at the
        budget of the first one of these, so that nothing but the pattern changes."""
        sized = self.paid.reading(base, max(self.readings))
        assert sized is not None, "readings that leave no budget are not searched"
        rounds = indexcache.search(
            self.paid.depth, lambda plan: self._loss(replace(sized, plan=str(plan)), False), min(self.readings)
        )
        ends = [plan for plan, _ in rounds if plan.reads_in_full in self.readings]
        return min(ends, key=lambda plan: self._loss_of_plan(plan, True))

    def _with(self, plan: LayerPlan) -> Method | None:
        """A plan at the budget that it leaves, or None. On the way to one that costs enough: at that one's, for with
        all that few reading layers leave, nothing would be missing."""
        reading = max(min(self.readings), len(readers(plan, self.base.attends_to_own_pick)))
        method = self.paid.reading(self.base, reading, len(plan.layers(Role.FULL)))
        return None if method is None else replace(method, plan=str(plan))

    def _changed(self, method: Method, name: str, value: int) -> Method | None:
        """None for what is no change, or does not fit, or is no option of the method."""
        if name not in (option.name for option in fields(method)):
            return None
        try:
            changed: Method = replace(method, **{name: value})  # type: ignore[arg-type]
        except ConfigError:
            return None
        pages = method.kept_pages(1 << 40)
        sized = changed if changed.kept_pages(1 << 40) == pages else changed.at_budget(pages)
        return sized if sized != method else None

    def _begin(self) -> list[LayerPlan]:
        """The method's own plan; and where layers pick for themselves, the one in which all do."""
        own, depth = self.base.attends_to_own_pick, self.paid.depth
        plans = [self.base.layer_plan(depth), *([every(depth)] if own else [])]
        return [
            plan
            for plan in dict.fromkeys(plans)
            if len(readers(plan, own)) in self.readings and not (own and plan.layers(Role.REUSE))
        ]

    def _loss_of_plan(self, plan: LayerPlan, thorough: bool) -> float:
        method = self._with(plan)
        return math.inf if method is None else self._loss(method, thorough)

    def _loss(self, method: Method, thorough: bool) -> float:
        windows = self.windows if thorough else [window.first(self.quick) for window in self.windows]

        def measure() -> float:
            return measure_windows(self.model, method, windows).differences.kl.mean().item()

        key = f"{written(method)} {'thorough' if thorough else 'quick'}"
        value = self.tried.get(key, measure)
        self.advance(1)
        return value


def written(method: Method) -> str:
    """A method as a command line writes it."""
    options = {**_own(method), "page_size": method.page_size}
    options["plan"] = method.plan or method.default_plan or DEFAULT_PRESET
    return f"{method.algorithm}:{','.join(f'{name}={value}' for name, value in options.items())}"


def settings(method: Method) -> dict[str, Any]:
    """What a plan file says beside the plan: all options but from which context on a row is sparse, which is the
    user's."""
    own = {name: value for name, value in _own(method).items() if name != "min_context"}
    if method.page_size != Method.page_size:
        own["page_size"] = method.page_size
    return {"algorithm": method.algorithm, **own}


def _own(method: Method) -> dict[str, Any]:
    """The options that not all methods have."""
    shared = {option.name for option in fields(Method)}
    return {option.name: getattr(method, option.name) for option in fields(method) if option.name not in shared}


@dataclass(frozen=True)
class Confirmed:
    """What a method makes of text that was not calibrated on. kl_interval: of its mean, with 95%."""

    name: str
    attended: float
    kl: Tensor
    numbers: dict[str, Any]


def confirm(model: Any, name: str, method: Any, windows: Sequence[Window], advance: Advance) -> Confirmed:
    """A method on windows, with how sure its numbers are, and how much its picks change from position to position."""
    found = measure_windows(model, method, windows, advance, picks=True)
    new_pages = {str(layer): share for layer, share in found.new_pages.items()}
    numbers = {"method": name, **found.numbers(), "recall": found.recall, "new_pages": new_pages}
    return Confirmed(name, found.attended, found.differences.kl, numbers)


def share(ours: Tensor, other: Tensor) -> dict[str, Any]:
    """The mean of our KLs as a share of the other's at the same positions, and where it lies with 95%."""
    both = torch.stack([ours, other], 1)
    low, high = interval(both, lambda drawn: drawn[..., 0].mean(1) / drawn[..., 1].mean(1).clamp_min(1e-30))
    return {"kl_share": (ours.mean() / other.mean().clamp_min(1e-30)).item(), "interval": [low, high]}
