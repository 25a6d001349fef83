"""The method that `calibrate` begins with, at the budget that sets the cost, and its own plan to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from deltakv.config import Delta, Method
from deltakv.errors import InputError
from deltakv.plan import Role

if TYPE_CHECKING:
    from deltakv.evals.paid import Paid

M = TypeVar("M", bound=Method)

#: A budget with room for whatever sinks and recent tokens a method is given, before it gets its own.
ROOMY = 1 << 30


def base_method(text: str, budget: int, sinks: int | None) -> Method:
    """The method that is calibrated, with that budget. Raises `DeltaKVError` subclasses."""
    from deltakv.methods import REGISTRY, from_options, option_types, read

    algorithm, given = read(text)
    if found := sorted({"plan", "budget", "window", "min_context"} & set(given)):
        raise InputError(
            f"--method {text!r} says {found[0]}; plan and budget are found, at the cost that --budget sets, and every "
            "row is sparse meanwhile; leave it out"
        )
    if sinks is not None and "sinks" in given:
        raise InputError(f"--sinks {sinks} and --method {text!r} both say sinks; give one")
    ours = {"budget": ROOMY, "min_context": 0, **({} if sinks is None else {"sinks": sinks})}
    known = option_types(REGISTRY[algorithm]) if algorithm in REGISTRY else {}
    method = from_options(algorithm, given | {name: value for name, value in ours.items() if name in known})
    if method.at_budget(1 << 20) is None:
        raise InputError(f"--method {text!r} leaves nothing out, so there is no plan to find; give another method")
    return _at_budget(method, budget)


def standard_method(base: Method, budget: int) -> Delta:
    """What sets the cost, and what all is compared with under the paper's plan: DELTA. Raises `InputError`."""
    if isinstance(base, Delta):
        return base
    size = base.page_size
    sinks = max(size, Delta.sinks)
    return _at_budget(Delta(page_size=size, sinks=sinks, budget=ROOMY, min_context=0), budget)


def _at_budget(method: M, budget: int) -> M:
    """The method with that budget, in tokens. Raises `InputError` if it is none for it."""
    if budget % method.page_size:
        raise InputError(f"--budget {budget} is not a multiple of the page size {method.page_size}")
    sized = method.at_budget(budget // method.page_size)
    if sized is None:
        raise InputError(
            f"--budget {budget} leaves no room beside the sinks of {method.algorithm}: two pages of "
            f"{method.page_size} tokens at least"
        )
    return sized


def own_plan(base: Method, paid: Paid) -> dict[str, Method]:
    """Another method than DELTA as it is without calibration, at the same cost; nothing, if that cannot be."""
    from deltakv.evals.plan_search import readers

    plan = base.layer_plan(paid.depth)
    if isinstance(base, Delta):
        return {}
    sized = paid.reading(base, len(readers(plan, base.attends_to_own_pick)), len(plan.layers(Role.FULL)))
    return {} if sized is None else {f"{base.algorithm}'s own plan": sized}
