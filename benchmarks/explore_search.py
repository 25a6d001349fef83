"""The search of `benchmarks/explore.py`: settings by their loss, and how one leads to the next."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lab import Windows, cost, options

Setting = dict[str, Any]
#: Positions of a first look.
QUICK = 32


class Search:
    """Settings by their loss, on the disk as soon as they are measured."""

    def __init__(self, out: Path, windows: Windows, until: float, seconds: float) -> None:
        self.windows, self.until, self.depth = windows, until, windows.lab.depth
        self.seconds = seconds
        self._out = out
        self.known: dict[str, dict[str, Any]] = {}
        if out.exists():
            for line in out.read_text().splitlines():
                told = json.loads(line)
                self.known[told["key"]] = told

    def measure(
        self, setting: Setting, count: int | None, stage: str, windows: Windows | None = None
    ) -> dict[str, Any]:
        places = windows or self.windows
        key = json.dumps([setting, count, "unseen" if windows else "seen"], sort_keys=True)
        if key not in self.known:
            begin = time.perf_counter()
            found = {"stage": stage, "set": "unseen" if windows else "seen", **places.measure(setting, count)}
            found = {"key": key, "setting": setting, **found, "seconds": round(time.perf_counter() - begin, 3)}
            self.known[key] = found
            with self._out.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return self.known[key]

    def late(self, share: float) -> bool:
        """Whether that share of the time is over."""
        return time.time() > self.until - (1 - share) * self.seconds

    def best(self, settings: Iterable[Setting], stage: str, share: float, keep: int = 4) -> Setting:
        """The best of some: all at a quick look, the best of these at a long one."""
        quick = []
        for number, setting in enumerate(settings):
            if quick and self.late(share):
                break
            quick.append((self.measure(setting, QUICK, stage)["kl"], number, setting))
        finalists = [setting for _, _, setting in sorted(quick, key=lambda one: one[:2])[:keep]]
        return min(finalists, key=lambda setting: self.loss(setting, stage))

    def loss(self, setting: Setting, stage: str) -> float:
        return self.measure(setting, None, stage)["kl"]


def plan(depth: int, select: Iterable[int], full: Iterable[int] = (), **rest: Any) -> Setting:
    """Layers before the first that reads are windows."""
    roles = ["R"] * depth
    for layer in full:
        roles[layer] = "F"
    for layer in select:
        roles[layer] = "S"
    first = min(select, default=depth)
    return {"roles": "".join("W" if r == "R" and n < first else r for n, r in enumerate(roles)), **rest}


def selecting(setting: Setting) -> list[int]:
    return [layer for layer, role in enumerate(setting["roles"]) if role == "S"]


def fitted(setting: Setting, context: int, most: float) -> Setting:
    """With the largest budget that the cost allows, the same in all sparse layers."""
    for pages in range(256, 1, -1):
        budget = pages * 16
        recent = min(setting.get("all", {}).get("recent", 128), budget // 32 * 16)
        other = {**setting, "all": {**setting.get("all", {}), "budget": budget, "recent": recent}}
        if cost(other, context) <= most:
            return other
    return setting


def grown(search: Search, most: float, reading: int, share: float) -> Setting:
    """Layers that pick, one by one where they help most, then moved about; at that cost all along."""
    context, depth = search.windows.context, search.depth
    beam: list[list[int]] = [[]]
    for _ in range(reading):
        tried = {}
        for chosen, layer in itertools.product(beam, range(depth)):
            if layer not in chosen:
                layers = tuple(sorted([*chosen, layer]))
                if layers not in tried and not search.late(share):
                    setting = fitted(plan(depth, layers), context, most)
                    tried[layers] = search.measure(setting, QUICK, f"grow {reading}")["kl"]
        beam = [list(layers) for layers in sorted(tried, key=lambda one: tried[one])[:3]] or beam
    beam = beam if beam[0] else [list(range(reading))]  # out of time before anything was tried
    best = search.best([fitted(plan(depth, b), context, most) for b in beam], f"grow {reading}", 1.0)
    for _ in range(4):
        if search.late(share):
            break
        found = search.best([best, *moves(search, best, most)], f"move {reading}", share)
        if found == best:
            break
        best = found
    return best


def moves(search: Search, best: Setting, most: float) -> Iterator[Setting]:
    layers = selecting(best)
    for layer in layers[1:]:  # reads, and does not pick
        roles = best["roles"]
        yield {**best, "roles": roles[:layer] + "F" + roles[layer + 1 :]}
    for layer, step in itertools.product(layers, (-3, -2, -1, 1, 2, 3)):
        other = sorted({*layers, layer + step} - {layer})
        if best["roles"][layer + step : layer + step + 1] == "F":
            continue
        if 0 <= layer + step < search.depth and len(other) == len(layers):
            in_full = [n for n, role in enumerate(best["roles"]) if role == "F"]
            yield fitted(plan(search.depth, other, in_full), search.windows.context, most)


def knobs(setting: Setting, context: int, most: float) -> Iterator[tuple[str, Setting]]:
    """One change each, at the same cost."""
    every, by_layer = setting.get("all", {}), setting.get("layers", {})

    def with_all(**change: Any) -> Setting:
        return fitted({**setting, "all": {**every, **change}}, context, most)

    for sinks in (0, 16, 32, 64, 128):
        yield f"sinks {sinks}", with_all(sinks=sinks)
    for recent in (16, 32, 64, 128, 256, 384, 512):
        if recent + every.get("sinks", 16) < options(setting, 0)["budget"]:
            yield f"recent {recent}", {**setting, "all": {**every, "recent": recent}}
    for score in ("mean", "tokmax", "pmax", "sqrt", "log"):
        yield f"score {score}", with_all(score=score)
    yield "a pick a KV head", with_all(group=True)
    yield "a pick a KV head, mean", with_all(group=True, score="mean")
    for smooth in (0.5, 0.8, 0.9, 0.95):
        yield f"smooth {smooth}", with_all(smooth=smooth)
    for mix in (0.3, 1.0):
        yield f"mix {mix}", with_all(mix=mix)
    yield "means", with_all(means=True)
    layers = selecting(setting)
    for first, second in itertools.permutations(range(len(layers)), 2):  # budget from one stretch to another
        changed = shifted(setting, stretch(setting, layers, first), stretch(setting, layers, second), 0.3)
        if changed is not None and cost(changed, context) <= most:
            yield f"budget from behind {layers[first]} to behind {layers[second]}", changed
    for layer in layers:
        told = {**by_layer, layer: {**by_layer.get(layer, {}), "score": "mean"}}
        yield f"score mean in {layer}", {**setting, "layers": told}


def stretch(setting: Setting, layers: list[int], index: int) -> list[int]:
    stop = layers[index + 1] if index + 1 < len(layers) else len(setting["roles"])
    return list(range(layers[index] + 1, stop))


def shifted(setting: Setting, source: list[int], target: list[int], share: float) -> Setting | None:
    if not source or not target:
        return None
    by_layer = {layer: dict(own) for layer, own in setting.get("layers", {}).items()}
    before = options(setting, source[0])
    less = before["budget"] - int(before["budget"] * share) // 16 * 16
    more = options(setting, target[0])["budget"] + (before["budget"] - less) * len(source) // len(target) // 16 * 16
    if less < before["sinks"] + 32:
        return None
    for group, budget in ((source, less), (target, more)):
        for layer in group:
            recent = min(options(setting, layer)["recent"], budget - before["sinks"])
            by_layer[layer] = {**by_layer.get(layer, {}), "budget": budget, "recent": recent // 16 * 16}
    return {**setting, "layers": by_layer}


def fine(search: Search, best: Setting, most: float) -> Iterator[tuple[str, Setting]]:
    """Changes to one layer: heads that have no say, and whose pick a layer follows."""
    by_layer, layers = best.get("layers", {}), selecting(best)

    def with_layer(layer: int, **change: Any) -> Setting:
        return {**best, "layers": {**by_layer, layer: {**by_layer.get(layer, {}), **change}}}

    for layer, head in itertools.product(layers, range(search.windows.lab.n_heads)):
        silent = options(best, layer)["heads"]
        if head not in silent:
            yield f"{layer} without head {head}", with_layer(layer, heads=[*silent, head])
    for layer, role in enumerate(best["roles"]):
        if role in "RW":  # picks for itself
            for letter in "BM":
                roles = best["roles"][:layer] + letter + best["roles"][layer + 1 :]
                yield f"{layer} is {letter}", fitted({**best, "roles": roles}, search.windows.context, most)
        for other in layers:
            if role == "R" and other < layer and other != options(best, layer)["follow"]:
                yield f"{layer} follows {other}", with_layer(layer, follow=other)


def climb(search: Search, best: Setting, most: float, share: float, stage: str, detail: bool) -> Setting:
    """The knob that helps most, again and again."""
    context = search.windows.context
    while not search.late(share):
        tried = list(knobs(best, context, most)) if not detail else list(fine(search, best, most))
        tried = [(name, one) for name, one in tried if cost(one, context) <= most + 1]
        value, found = search.loss(best, stage), search.best([best, *(one for _, one in tried)], stage, share)
        name = next((name for name, one in tried if one == found), None)
        if name is None or search.loss(found, stage) >= value * 0.99:
            break
        best = found
        say(f"  {stage}: {name}", search.measure(best, None, stage))
    return best


def say(name: str, found: dict[str, Any]) -> None:
    print(
        f"{name:44s} {found['cost'] / 1e3:6.1f}k  KL {found['kl']:.4f}  p99 {found['p99']:.2f}  "
        f"top-1 {found['top1']:.3f}  perplexity {found['perplexity']:.3f}",
        flush=True,
    )
