"""`deltakv calibrate`: the best plan for a cost, by KL to full attention on some text, confirmed on other text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltakv.config import Delta
from deltakv.errors import ConfigError, InputError
from deltakv.evals.journal import remove_whole, write_whole
from deltakv.evals.plan_search import search_plan
from deltakv.evals.windows import Window, interval, measure_windows
from deltakv.plan import LayerPlan, paper

Advance = Callable[[int], None]

#: What is tried once the plan stands, one after the other, at the same budget.
KNOBS = {"recent": (32, 64, 128, 256, 512), "sinks": (0, 16, 32, 64)}


class Tried:
    """Losses that were measured, by what they are of, kept in a file: a search that is started again finds them there.

    header: what they depend on; a file of another run is refused. The file is written anew, whole, after each one.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self.losses: dict[str, float] = {}
        self._header = json.loads(json.dumps(header))
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                same = kept["header"] == self._header
                self.losses = dict(kept["losses"])
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
            write_whole(self._path, json.dumps({"header": self._header, "losses": self.losses}))
        return self.losses[key]

    def forget(self) -> None:
        """The calibration is done and stands elsewhere."""
        remove_whole(self._path)


@dataclass(frozen=True)
class Paid:
    """What a step may cost: no more attended tokens, summed over layers, than if `reading` of `depth` layers read all
    and the others `budget` tokens. lengths: of a row, the shortest and the longest; it holds at each, and between."""

    depth: int
    reading: int
    budget: int
    lengths: tuple[int, ...]

    def fitted(self, base: Delta, reading: int) -> Delta | None:
        """`base` with the budget that this leaves if `reading` layers read all, fewer than there are; None if that is
        less than sinks and two pages, or nothing less than all."""
        paid = [self.reading * length + (self.depth - self.reading) * self.budget for length in self.lengths]
        left = min(cost - reading * length for cost, length in zip(paid, self.lengths, strict=True))
        pages = left // (self.depth - reading) // base.page_size
        if pages < base.sink_pages + 2 or pages * base.page_size >= min(self.lengths):
            return None
        recent = min(base.recent_pages, max(1, (pages - base.sink_pages) // 2))
        return replace(base, budget=pages * base.page_size, recent=recent * base.page_size)


@dataclass
class Calibration:
    """One search. base: sinks, and the recent tokens to begin with; plan and budget are what is searched for.

    paid: what a step may cost. readings: how many layers may read everything: the more of them, the less is left for
    the others. quick: positions of each window that a first look takes. advance: told of every loss that is measured.
    """

    model: Any
    base: Delta
    paid: Paid
    readings: Sequence[int]
    windows: Sequence[Window]
    quick: int
    tried: Tried
    advance: Advance = field(default=lambda count: None)

    def run(self) -> Delta:
        """The best setting found."""
        plan = search_plan(self.paid.depth, self.readings, self._loss_of_plan, self._begin())
        best = self._with(plan)
        for name, values in KNOBS.items():
            others = [self._changed(best, name, value) for value in values]
            best = min([best, *filter(None, others)], key=lambda method: self._loss(method, True))
        return best

    def _with(self, plan: LayerPlan) -> Delta:
        """A plan at the budget that it leaves. On the way to one that costs enough: at that one's, for with all that
        few reading layers leave, nothing would be missing."""
        reading = max(plan.reads_in_full, min(self.readings))
        method = self.paid.fitted(self.base, reading)
        assert method is not None, "readings that leave no budget are not searched"
        return replace(method, plan=str(plan))

    def _changed(self, method: Delta, name: str, value: int) -> Delta | None:
        """None for what is no change, or does not fit."""
        try:
            changed: Delta = replace(method, **{name: value})  # type: ignore[arg-type]
        except ConfigError:
            return None
        return changed if changed != method else None

    def _begin(self) -> list[LayerPlan]:
        known = paper(self.paid.depth)
        return [known] if known.reads_in_full in self.readings else []

    def _loss_of_plan(self, plan: LayerPlan, thorough: bool) -> float:
        return self._loss(self._with(plan), thorough)

    def _loss(self, method: Delta, thorough: bool) -> float:
        windows = self.windows if thorough else [window.first(self.quick) for window in self.windows]

        def measure() -> float:
            return measure_windows(self.model, method, windows).differences.kl.mean().item()

        key = f"{written(method)} {'thorough' if thorough else 'quick'}"
        value = self.tried.get(key, measure)
        self.advance(1)
        return value


def written(method: Delta) -> str:
    """A method as a command line writes it."""
    own = f"budget={method.budget},recent={method.recent},sinks={method.sinks},min_context={method.min_context}"
    return f"delta:{own},page_size={method.page_size},plan={method.plan or 'paper'}"


def settings(method: Delta) -> dict[str, Any]:
    """What a plan file says beside the plan."""
    return {"algorithm": method.algorithm, "budget": method.budget, "recent": method.recent, "sinks": method.sinks}


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
