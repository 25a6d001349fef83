"""The search for a plan that reads few layers in full: which ones, and which of them pick.

Greedy, from the first layer on: a layer that picks is added where it helps most, as often as the cost allows, with the
first layer or without it: layers before the first that picks then read sinks and recent tokens. The more layers read
all, the less is left to what the others read, so the best plans of the most promising numbers of them go on: each
reading layer may move, and may read without picking. Every candidate is looked at quickly, and only the best again, and
longer. The same losses give the same plan, so a search that goes on from losses it has kept ends where it would have.

Where layers pick for themselves and attend to their picks (`own_picks`), those that read everything are FULL, and all
others SELECT: the search is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from deltakv.plan import LayerPlan, Role

#: A loss of a plan, the less the better; quick (False) or thorough (True).
Loss = Callable[[LayerPlan, bool], float]

#: Candidates that a quick look leaves for a thorough one.
KEPT = 4

#: Numbers of reading layers whose best plan is improved: which of them is best in the end, the beginning hardly tells.
PROMISING = 3

#: How far a reading layer may move at once.
REACH = (-3, -2, -1, 1, 2, 3)


def best_of(candidates: Iterable[LayerPlan], loss: Loss) -> tuple[float, LayerPlan]:
    """The best of some plans, of the best by a quick look. Ties go to the earlier one."""
    quick = [(loss(plan, False), number, plan) for number, plan in enumerate(dict.fromkeys(candidates))]
    finalists = sorted(quick)[:KEPT]
    value, _, plan = min((loss(plan, True), number, plan) for _, number, plan in finalists)
    return value, plan


def search_plan(
    depth: int,
    readings: Sequence[int],
    loss: Loss,
    begin: Sequence[LayerPlan] = (),
    rounds: int = 4,
    own_picks: bool = False,
) -> LayerPlan:
    """The best plan found of `depth` layers with one of these numbers of them in full; one with none of them is only
    found in `begin`.

    begin: plans to start from as well, such as the paper's. rounds: of small changes to one, at most.
    """
    chosen, grown = [0], []
    while len(chosen) <= max(readings) and len(chosen) < depth:
        free = [layer for layer in range(depth) if layer not in chosen]
        if len(chosen) in readings:
            grown.append(_reading(depth, chosen, own_picks))
        _, plan = best_of((_reading(depth, [*chosen, layer], own_picks) for layer in free), loss)
        chosen = readers(plan, own_picks)
        if len(chosen) - 1 in readings:
            grown.append(_reading(depth, chosen[1:], own_picks))
    # Sorting keeps the order of ties, and so does `min`: the earlier plan.
    ranked = sorted(((loss(plan, True), plan) for plan in [*grown, *begin]), key=lambda start: start[0])
    starts: dict[int, tuple[float, LayerPlan]] = {}
    for start in ranked:
        starts.setdefault(len(readers(start[1], own_picks)), start)
    ends = [_improved(*start, loss, rounds, own_picks) for start in list(starts.values())[:PROMISING]]
    return min(ends, key=lambda end: end[0])[1]


def readers(plan: LayerPlan, own_picks: bool) -> list[int]:
    """The layers that read everything."""
    picking = [] if own_picks else plan.layers(Role.SELECT)
    return sorted([*plan.layers(Role.FULL), *picking])


def _improved(best: float, plan: LayerPlan, loss: Loss, rounds: int, own_picks: bool) -> tuple[float, LayerPlan]:
    """The best plan that small changes to one with the loss `best` lead to, each to the best of them as long as that
    helps."""
    for _ in range(rounds):
        near = list(neighbours(plan, own_picks))
        if not near:
            break
        value, other = best_of(near, loss)
        if value >= best:
            break
        best, plan = value, other
    return best, plan


def neighbours(plan: LayerPlan, own_picks: bool = False) -> Iterator[LayerPlan]:
    """Plans of the same cost, one change away: a reading layer moves, or picks where it did not, or the other way."""
    reading = readers(plan, own_picks)
    for layer in reading:
        role = plan.roles[layer]
        if not own_picks:
            roles = list(plan.roles)
            roles[layer] = Role.FULL if role is Role.SELECT else Role.SELECT
            yield _settled(roles)
        for step in REACH:
            other = layer + step
            if 0 <= other < len(plan) and other not in reading:
                roles = list(plan.roles)
                roles[layer], roles[other] = roles[other], role
                yield _settled(roles)


def _reading(depth: int, layers: Iterable[int], own_picks: bool) -> LayerPlan:
    """The plan in which these layers read everything; and pick, unless all others pick for themselves."""
    dear, little = (Role.FULL, Role.SELECT) if own_picks else (Role.SELECT, Role.REUSE)
    chosen = set(layers)
    return _settled([dear if layer in chosen else little for layer in range(depth)])


def _settled(roles: Sequence[Role]) -> LayerPlan:
    """Layers that reuse take the last pick; those before the first one read a window, which costs as much."""
    first = roles.index(Role.SELECT) if Role.SELECT in roles else len(roles)
    little = (Role.REUSE, Role.WINDOW)
    return LayerPlan(tuple(little[layer < first] if role in little else role for layer, role in enumerate(roles)))
