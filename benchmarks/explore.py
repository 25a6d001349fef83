"""What makes picks better at the same bytes? Tries it on a model, in minutes on a GPU, and keeps all that was tried.

python benchmarks/explore.py --model /tmp/models/qwen --texts a.txt b.txt c.txt --out tried.jsonl --seconds 240

A line of --out is one setting on one set of windows; a run that is started again takes from there what it holds. The
last lines, on text that no choice rests on ("unseen"), are the ones to believe.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from deltakv.bench.provenance import provenance
from explore_search import Search, Setting, climb, grown, knobs, plan, say, selecting
from lab import DEFAULTS, Lab, cost


def known(depth: int) -> dict[str, Setting]:
    scale = depth / 28
    paper = sorted({2, max(2, round(14 * scale)), max(2, round(22 * scale))})
    budget = DEFAULTS["budget"]
    half, quarter = {"budget": budget // 2}, {"budget": budget // 4, "recent": budget // 8}
    rows = {
        "full": {"roles": "F" * depth},
        "the paper's, no sinks": plan(depth, paper, (0, 1), all={"sinks": 0}),
        "the paper's": plan(depth, paper, (0, 1)),
        "the paper's, quarter": plan(depth, paper, (0, 1), all=quarter),
        "sinks and window": plan(depth, ()),
        "bounds, FF": {"roles": "FF" + "B" * (depth - 2)},
        "bounds a KV head, FF": {"roles": "FF" + "B" * (depth - 2), "all": {"group": True}},
        "means, FF": {"roles": "FF" + "M" * (depth - 2)},
        "means, FF, half": {"roles": "FF" + "M" * (depth - 2), "all": half},
        "means a KV head, FF": {"roles": "FF" + "M" * (depth - 2), "all": {"group": True}},
        "means": {"roles": "M" * depth},
        "every layer picks": {"roles": "S" * depth},
    }
    if depth == 24:
        rows |= {
            "3, 9, 16": plan(depth, (3, 9, 16), (0, 1, 2)),
            "0, 3, 9, 16, 20": plan(depth, (0, 3, 9, 16, 20)),
            "2, 4, 7, 10, 13, 17, 20": plan(depth, (2, 4, 7, 10, 13, 17, 20), (0, 1)),
        }
    if depth == 30:
        rows["0, 7, 18, 20, 23"] = plan(depth, (0, 7, 18, 20, 23))
    return rows


def pieces(lab: Lab, paths: list[Path], context: int, each: int) -> tuple[list[Any], list[Any]]:
    """Of each text `each` pieces to choose by, and others that no choice sees."""
    seen, unseen = [], []
    for path in paths:
        ids = torch.tensor(lab.tokenizer(path.read_text(), verbose=False)["input_ids"])
        parts = [part for part in ids.split(context + 1) if len(part) == context + 1]
        seen += parts[: 2 * each : 2]
        unseen += parts[1 : 2 * each + 1 : 2]
    return seen, unseen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--positions", type=int, default=96)
    parser.add_argument("--unseen-positions", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    told = parser.parse_args()
    until = time.time() + told.seconds
    DEFAULTS.update(budget=told.budget, recent=told.budget // 8)
    lab = Lab(told.model, told.device)
    seen, unseen = pieces(lab, told.texts, told.context, told.each)
    search = Search(told.out, lab.open(seen, told.positions), until, told.seconds)
    print(
        f"{len(seen)} windows of {told.context:,} tokens, ready {told.seconds - (until - time.time()):.0f} s in",
        flush=True,
    )
    rows = known(lab.depth)
    for name, setting in rows.items():
        say(name, search.measure(setting, None, name))
    paper = cost(rows["the paper's"], told.context)
    quarter = cost(rows["the paper's, quarter"], told.context)
    chosen: dict[str, Setting] = dict(rows)
    found = {}
    for number, reading in enumerate((5, 4, 3, 6, 7)):
        found[reading] = grown(search, paper, reading, 0.08 + 0.08 * (number + 1))
        chosen[f"{reading} read"] = found[reading]
        say(f"{reading} read: {selecting(found[reading])}", search.measure(found[reading], None, "grown"))
    fit = [setting for setting in found.values() if cost(setting, told.context) <= paper]
    ranked = sorted(fit, key=lambda one: search.loss(one, "grown"))
    begin = ranked[0]
    for name, setting in knobs(begin, told.context, paper):
        if not search.late(0.55):
            say(f"  {name}", search.measure(setting, None, f"knob: {name}"))
    for name, setting in (("best", ranked[0]), ("second", ranked[-1 if len(ranked) < 2 else 1])):
        chosen[f"{name}, tuned"] = climb(
            search, setting, paper, 0.62 if name == "best" else 0.66, f"{name}, tuned", False
        )
    best = min((chosen["best, tuned"], chosen["second, tuned"]), key=lambda one: search.loss(one, "tuned"))
    chosen["in detail"] = climb(search, best, paper, 0.74, "in detail", True)
    for number, reading in enumerate((3, 4, 2)):
        plain = grown(search, quarter, reading, 0.77 + 0.03 * number)
        chosen[f"quarter, {reading} read"] = plain
        say(f"quarter, {reading} read: {selecting(plain)}", search.measure(plain, None, "quarter"))
    best = min((chosen[f"quarter, {n} read"] for n in (2, 3, 4)), key=lambda one: search.loss(one, "quarter"))
    chosen["quarter, tuned"] = climb(search, best, quarter, 0.88, "quarter, tuned", False)
    for name in ("5 read", "best, tuned", "in detail"):
        every = {**chosen[name].get("all", {}), "budget": DEFAULTS["budget"] // 4, "recent": DEFAULTS["budget"] // 16}
        layers = {
            layer: {option: value for option, value in own.items() if option not in ("budget", "recent")}
            for layer, own in chosen[name].get("layers", {}).items()
        }
        chosen[f"{name}, budget 256"] = {**chosen[name], "all": every, "layers": layers}
    print("on unseen windows", flush=True)
    search.windows.keys.clear()
    places = lab.open(unseen, told.unseen_positions)
    last = []
    for name, setting in chosen.items():
        last.append(search.measure(setting, None, name, places))
        say(name, last[-1])
    facts = {"bench": "explore", **provenance(lab.model), "model": Path(told.model).name, "context": told.context}
    single = [one for one in search.known.values() if one["stage"].startswith("knob: ")]
    facts |= {"texts": [path.name for path in told.texts], "knobs": single, "unseen": last}
    told.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
