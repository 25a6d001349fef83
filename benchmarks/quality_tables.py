"""Tables of what methods do to real models: calibrations, the Pareto of all methods, and what was tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown import HERE, commit, grid


def kinds(kind: str) -> list[dict[str, Any]]:
    """Results of that kind, by name of file."""
    found = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    return [data for data in found if data.get("kind") == kind]


def pareto(data: dict[str, Any]) -> str:
    """KL by method and budget, with the attended tokens that it took: a table for each context. In bold, what nothing
    beats that attends to as little."""
    parts = []
    for context in sorted({row["context"] for row in data["results"]}):
        here = [row for row in data["results"] if row["context"] == context and row["budget"] is not None]
        budgets = sorted({row["budget"] for row in here})
        names: dict[str, dict[int, dict[str, Any]]] = {}
        for row in here:
            names.setdefault(_without_budget(row["method"]), {})[row["budget"]] = row
        rows = [
            [name, *(_kl_and_cost(by_budget.get(budget), here) for budget in budgets)]
            for name, by_budget in sorted(names.items(), key=lambda one: min(x["kl_mean"] for x in one[1].values()))
        ]
        title = f"**{data['model']}, {context:,} tokens**: mean KL, and attended tokens a step in thousands"
        parts.append(grid(title, " | ".join(["method", *(f"budget {budget:,}" for budget in budgets)]), rows))
    facts = f"{len(data['texts'])} texts, {data['positions']} positions each"
    return "\n\n".join([*parts, f"<sub>{_measured(data)}, {facts}</sub>"])


def _without_budget(method: str) -> str:
    name, _, rest = method.partition(":")
    others = [option for option in rest.split(",") if option.split("=")[0] not in ("budget", "window", "")]
    return " ".join([name, *others])


def _kl_and_cost(row: dict[str, Any] | None, all_of_them: list[dict[str, Any]]) -> str:
    if row is None:
        return ""
    beaten = any(
        other["kl_mean"] < row["kl_mean"] and other["attended_tokens"] <= row["attended_tokens"]
        for other in all_of_them
    )
    said = f"{row['kl_mean']:.3f}" if beaten else f"**{row['kl_mean']:.3f}**"
    return f"{said} ({row['attended_tokens'] / 1e3:.0f}k)"


def calibrations() -> str:
    """What `calibrate` confirmed, a row a method."""
    rows = []
    for path in sorted((HERE / "results").glob("*-plan.json")):
        data = json.loads(path.read_text())
        for row in data["confirmed"]:
            low, high = row["kl_interval"]
            cells = [Path(data["model"]).name, f"{data['context']:,}", row["method"], f"{row['attended_tokens']:,.0f}"]
            cells += [f"{row['kl_mean']:.4f} ({low:.4f}-{high:.4f})", f"{row['top1']:.1%}", f"{row['perplexity']:.2f}"]
            rows.append([*cells, str(row["positions"]), f"`{data['plan']}`" if row["method"] == "calibrated" else ""])
    headings = "model | context | method | attended | mean KL (95%) | top-1 | perplexity | positions | plan"
    return grid("", headings, rows).strip()


def quality() -> str:
    """How far methods are from full attention on real models."""
    return "\n\n".join([calibrations(), *(pareto(data) for data in kinds("pareto"))])


def tried() -> str:
    """What `benchmarks/explore.py` tried, on text that no choice rests on, and the single changes."""
    heads = "setting | attended | mean KL | p99 KL | top-1 | perplexity"
    parts = []
    for data in kinds("explore"):
        for title, rows in (("on unseen text", data["unseen"]), ("one change each, at the same cost", data["knobs"])):
            heading = f"**{data['model']}, {data['context']:,} tokens**: {title}"
            parts.append(grid(heading, heads, [_setting(row) for row in rows]))
        parts.append(f"<sub>{_measured(data)}</sub>")
    return "\n\n".join(parts) or "No run is stored yet: `bash benchmarks/quality.sh explore-qwen` makes one."


def _setting(row: dict[str, Any]) -> list[str]:
    cells = [row["stage"].removeprefix("knob: "), f"{row['cost'] / 1e3:.1f}k", f"{row['kl']:.4f}"]
    return [*cells, f"{row['p99']:.2f}", f"{row['top1']:.1%}", f"{row['perplexity']:.2f}"]


def _measured(data: dict[str, Any]) -> str:
    versions = data["versions"]
    gpus = (data.get("machine") or {}).get("gpus")
    where = gpus[0] if gpus else f"{data['machine']['cores']} cores of {data['machine']['cpu']}"
    software = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"{data['date'][:10]}, {where}, {data['dtype']}, {software}, commit {commit(data)}"
