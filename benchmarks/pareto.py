"""All methods at several budgets: how far from full attention, for how many attended tokens.

python benchmarks/pareto.py --model /tmp/models/qwen --name qwen --texts a.txt b.txt c.txt --contexts 4000,8000 \
    --plan calibrated.json --out pareto.json --seconds 500

Evaluation mode, on the end of one piece of each text. A method is on the disk as soon as it is measured (OUT.lines);
the same command goes on where a run was stopped, or ran out of --seconds. The cheapest methods to measure come first.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deltakv import loading
from deltakv.bench.provenance import provenance
from deltakv.bench.random_model import kv_shape
from deltakv.evals import texts
from deltakv.evals.windows import Window, measure_windows, open_window
from deltakv.methods import parse

#: Methods as a report shows them, and what they are. {b}: the budget; {h}: half of it; {w}: what is left of it beside a
#: sink page; {p}: the calibrated plan. Those that take long to measure come last.
QUICK = {
    "full": "full",
    "delta:budget={b},sinks=0": "delta:budget={b},sinks=0",
    "delta:budget={b}": "delta:budget={b}",
    "delta:budget={b},plan=calibrated": "delta:budget={b},plan={p}",
    "quest:budget={b}": "quest:budget={b}",
    "streaming:window={w}": "streaming:window={w}",
    "tidal:budget={b}": "tidal:budget={b}",
    "indexcache:budget={b}": "indexcache:budget={b}",
    "lessismore:budget={b}": "lessismore:budget={b}",
    "tactic:budget={b}": "tactic:budget={b}",
}
SLOW = {
    "tokenselect:budget={b}": "tokenselect:budget={b}",
    "refreshkv:budget={b}": "refreshkv:budget={b}",
    "h2o:budget={b}": "h2o:budget={b},recent={h}",
    "a2sf:budget={b}": "a2sf:budget={b}",
    "lazyeviction:budget={b}": "lazyeviction:budget={b}",
}


def asked(methods: dict[str, str], budgets: list[int], plan: str | None) -> Iterator[tuple[str, str, int | None]]:
    """As a report shows it, as a command line writes it, and the budget."""
    for budget, (name, pattern) in itertools.product(budgets, methods.items()):
        sizes = {"b": budget, "h": budget // 2, "w": budget - 16, "p": plan}
        if "{" not in pattern:
            if budget == budgets[0]:
                yield name, pattern, None
        elif plan is not None or "{p}" not in pattern:
            yield name.format(**sizes), pattern.format(**sizes), budget


def pieces(tokenizer: Any, paths: list[Path], context: int, skip: int) -> list[torch.Tensor]:
    """One piece of each text, the one after `skip` others: where `calibrate` has chosen by the first."""
    found = []
    for path in paths:
        parts = texts.all_tokens(tokenizer, path.read_text(encoding="utf-8")).split(context + 1)
        parts = [part for part in parts if len(part) == context + 1]
        found.append(parts[min(skip, len(parts) - 1)])
    return found


def measured(model: Any, text: str, windows: list[Window]) -> dict[str, Any]:
    begin = time.perf_counter()
    found = measure_windows(model, parse(text), windows)
    heads, dim = kv_shape(model.config)
    return {
        **found.numbers(),
        "attended_bytes": found.attended * (2 * heads * dim * 2),  # K and V, in 16 bits
        "seconds": round(time.perf_counter() - begin, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--contexts", default="4000,8000")
    parser.add_argument("--budgets", default="256,512,1024,2048")
    parser.add_argument("--plan", help="of calibrate: the calibrated plan at every budget")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    told = parser.parse_args()
    until = time.time() + told.seconds
    torch.set_grad_enabled(False)
    model = loading.load_model(told.model, told.dtype, told.device)
    tokenizer = loading.load_tokenizer(told.model)
    budgets = [int(one) for one in told.budgets.split(",")]
    plan = json.loads(Path(told.plan).read_text(encoding="utf-8"))["plan"] if told.plan else None
    lines = told.out.with_name(told.out.name + ".lines")
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(row["context"], row["written"]) for row in known}
    whole = True
    for methods in (QUICK, SLOW):
        for context in (int(one) for one in told.contexts.split(",")):
            todo = [row for row in asked(methods, budgets, plan) if (context, row[1]) not in done]
            todo = [row for row in todo if row[2] is None or row[2] < context]
            if not todo or time.time() > until:
                whole &= not todo
                continue
            found = pieces(tokenizer, told.texts, context, 1)
            windows = [open_window(model, piece, told.positions, 16) for piece in found]
            for name, written, budget in todo:
                if time.time() > until:
                    whole = False
                    break
                row = {"method": name, "written": written, "context": context, "budget": budget}
                try:
                    row |= measured(model, written, windows)
                except Exception:  # the others are measured all the same; this one is not said to be
                    traceback.print_exc()
                    print(f"FAILED: {written} at {context}", flush=True)
                    whole = False
                    continue
                known.append(row)
                with lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{context:6,} {written:60s} {row['attended_tokens']:9,.0f}  KL {row['kl_mean']:.4f}  "
                    f"top-1 {row['top1']:.3f}  {row['seconds']:.1f} s",
                    flush=True,
                )
            del windows
            gc.collect()
    facts = {"bench": "pareto", **provenance(model), "model": told.name, "texts": [path.name for path in told.texts]}
    data = {**facts, "positions": told.positions, "whole": whole, "results": known}
    told.out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print("all is measured" if whole else "not all is measured; the same command goes on")
    sys.exit(not whole)


if __name__ == "__main__":
    main()
