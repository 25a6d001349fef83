"""The search for a plan that reads few layers in full: which ones, and which of them pick.

Greedy, from the first layer on: a layer that picks is added where it helps most, as often as the cost allows; the best
number of them is kept, for more of them leave less to what the others read; then each reading layer may move, and may
read without picking. Every candidate is looked at quickly, and only the best again, and
longer. The same losses give the same plan, so a search that goes on from losses it has kept ends where it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from deltakv.errors import PlanError
from deltakv.plan import LayerPlan, Role

#: A loss of a plan, the less the better; quick (False) or thorough (True).
Loss = Callable[[LayerPlan, bool], float]

#: Candidates that a quick look leaves for a thorough one.
KEPT = 4

#: How far a reading layer may move at once.
REACH = (-3, -2, -1, 1, 2, 3)


def best_of(candidates: Iterable[LayerPlan], loss: Loss) -> tuple[float, LayerPlan]:
    """The best of some plans, of the best by a quick look. Ties go to the earlier one."""
    quick = [(loss(plan, False), number, plan) for number, plan in enumerate(dict.fromkeys(candidates))]
    finalists = sorted(quick)[:KEPT]
    value, _, plan = min((loss(plan, True), number, plan) for _, number, plan in finalists)
    return value, plan


def search_plan(
    depth: int, readings: Sequence[int], loss: Loss, begin: Sequence[LayerPlan] = (), rounds: int = 4
) -> LayerPlan:
    """The best plan found of `depth` layers with one of these numbers of them in full, each at least 1.

    begin: plans to start from as well, such as the paper's. rounds: of small changes to the best one, at most.
    """
    chosen, grown = [0], []
    while True:
        if len(chosen) in readings:
            grown.append(_selecting(depth, chosen))
        if len(chosen) >= max(readings):
            break
        free = [layer for layer in range(depth) if layer not in chosen]
        _, plan = best_of((_selecting(depth, [*chosen, layer]) for layer in free), loss)
        chosen = plan.layers(Role.SELECT)
    best, plan = min(((loss(plan, True), number, plan) for number, plan in enumerate([*grown, *begin])))[::2]
    for _ in range(rounds):
        near = list(neighbours(plan))
        if not near:
            break
        value, other = best_of(near, loss)
        if value >= best:
            break
        best, plan = value, other
    return plan


def neighbours(plan: LayerPlan) -> Iterator[LayerPlan]:
    """Plans of the same cost, one change away: a reading layer moves, or picks where it did not, or the other way."""
    for layer, role in enumerate(plan.roles):
        if role is Role.REUSE:
            continue
        roles = list(plan.roles)
        roles[layer] = Role.FULL if role is Role.SELECT else Role.SELECT
        yield from _legal(roles)
        for step in REACH:
            other = layer + step
            if 0 <= other < len(roles) and plan.roles[other] is Role.REUSE:
                roles = list(plan.roles)
                roles[layer], roles[other] = Role.REUSE, role
                yield from _legal(roles)


def _selecting(depth: int, layers: Iterable[int]) -> LayerPlan:
    return LayerPlan.from_layers(depth, select=layers)


def _legal(roles: Iterable[Role]) -> Iterator[LayerPlan]:
    try:
        yield LayerPlan(tuple(roles))
    except PlanError:  # a layer would reuse what none has picked
        return
