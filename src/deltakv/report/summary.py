"""One page of all results: accuracy against attended tokens, KL against budget, step time against context, picks."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from deltakv.errors import DeltaKVError
from deltakv.evals.picks import PickRecord
from deltakv.methods import parse
from deltakv.report.charts import Axis, Point, chart, mark
from deltakv.report.page import fill
from deltakv.report.plots import ACCENT, KL_FLOOR, RECENT, SINK
from deltakv.report.results import Entry, Results
from deltakv.report.wording import (
    DENSE,
    answers_headline,
    answers_table,
    fidelity_headline,
    fidelity_table,
    steps_headline,
    steps_table,
    table,
)


def summary_page(found: Results, title: str) -> str:
    """The HTML. Sections for which there is nothing are left out."""
    style = _Style(found)
    sections = [
        _section("Answers", "Accuracy against attended tokens, with 95% intervals.", map(style.answers, found.answers)),
        _section(
            "Fidelity", "The distance of next-token distributions from full attention's, in nats; less is better.",
            [style.fidelity(group) for group in _groups(found.fidelity, "model", "context", "text")],
        ),
        _section(
            "Speed", "Milliseconds a decode step.",
            [style.steps(group) for group in _groups(found.steps, "model", "batch", "where")],
        ),
        _section("Picks", "The pages that each Δ-layer keeps at each step.", [_picks(*pair) for pair in found.picks]),
        _section("Where the numbers are from", "", [_sources(found.sources)]),
    ]  # fmt: skip
    return fill("summary.html", {"TITLE": title}, {"SECTIONS": "".join(sections)})


class _Style:
    """One number a series all over the page: its colour and shape. What attends to everything is grey: 0 and below."""

    def __init__(self, found: Results) -> None:
        methods = [r["method"] for run in found.answers for r in run["results"]]
        methods += [entry["method"] for entry in [*found.fidelity, *found.steps]]
        series = sorted(dict.fromkeys(map(series_of, methods)), key=lambda name: name.split()[0] != "delta")
        self.numbers = {name: -number for number, name in enumerate(DENSE)}
        for name in series:
            self._number(name)

    def _number(self, name: str) -> int:
        return self.numbers.setdefault(name, 1 + len(self.numbers) - len(DENSE))

    def answers(self, run: Entry) -> str:
        results = run["results"]
        head = f"{run['model']} on {run['task']}, {results[0]['questions']} questions"
        head += f", each behind {run['examples']} worked examples" if run.get("examples") else ""
        if "perplexity" in results[0]:
            return _block(head, answers_headline(results), "", answers_table(results))
        points = []
        for result in results:
            method, (low, high) = result["method"], result["interval"]
            attended, right = (result["attended_tokens"] or 0) / 1e3, result["accuracy"] * 100
            points.append(Point(attended, right, series_of(method), label_of(method), low * 100, high * 100, method))
        x, y = Axis("attended tokens a step, thousands", _form(points), zero=True), Axis("accuracy, %", zero=True)
        drawn = self._figure(chart(points, x, y, self.numbers, frontier="up"), points)
        return _block(head, answers_headline(results), drawn, answers_table(results))

    def fidelity(self, group: Sequence[Entry]) -> str:
        one = group[0]
        sparse = [entry for entry in group if entry["kl_mean"] > KL_FLOOR]
        head = f"{one['model']}, {one['context']:,} tokens of {one['text']}" if one.get("context") else one["model"]
        drawn = ""
        if len(sparse) > 1:
            points = [
                Point(entry["attended_tokens"] / 1e3, entry["kl_mean"], series_of(entry["method"]),
                      label_of(entry["method"]), says=f"{entry['method']}: KL {entry['kl_mean']:.3g}")
                for entry in sparse
            ]  # fmt: skip
            x, y = (
                Axis("attended tokens a step, thousands", _form(points), zero=True),
                Axis("mean KL", "{:.3g}", log=True),
            )
            drawn = self._figure(chart(points, x, y, self.numbers, frontier="down"), points)
            drawn += self._by_budget(sparse)
        return _block(head, fidelity_headline(group), drawn, _folded(fidelity_table(group)))

    def _by_budget(self, sparse: Sequence[Entry]) -> str:
        """KL over budget, if a series has two budgets at least."""
        points = [
            Point(float(budget), entry["kl_mean"], series_of(entry["method"]), says=entry["method"])
            for entry in sparse
            if (budget := budget_of(entry["method"])) is not None
        ]
        budgets = {series: {p.x for p in points if p.series == series} for series in {p.series for p in points}}
        points = [point for point in points if len(budgets[point.series]) > 1]
        if not points:
            return ""
        x, y = Axis("budget, tokens", log=True), Axis("mean KL", "{:.3g}", log=True)
        return self._figure(chart(points, x, y, self.numbers, lines=True), points)

    def steps(self, group: Sequence[Entry]) -> str:
        one = group[0]
        methods = {entry["method"] for entry in group}
        alone = len({series_of(method) for method in methods}) == len(methods)  # else a line would join two budgets
        points = []
        for entry in group:
            name = series_of(entry["method"]) if alone else entry["method"]
            self._number(name)
            says = f"{entry['method']}: {entry['step_ms']:.2f} ms"
            points.append(Point(entry["context"] / 1e3, entry["step_ms"], name, says=says))
        x, y = Axis("tokens of context, thousands", _form(points), zero=True), Axis("ms a step", "{:,.3g}", zero=True)
        drawn = self._figure(chart(points, x, y, self.numbers, lines=True), points)
        head = f"{one['model']}, batch {one['batch']}, {one['where']}"
        return _block(head, steps_headline(group), drawn, _folded(steps_table(group)))

    def _figure(self, drawn: str, points: Sequence[Point]) -> str:
        named = dict.fromkeys(point.series for point in points)
        keys = "".join(f"<span>{mark(self.numbers[name])}{escape(name)}</span>" for name in named)
        return f'<figure>{drawn}<figcaption class="legend">{keys}</figcaption></figure>'


def series_of(method: str) -> str:
    """A method without its budget: `delta:budget=512,sinks=0` is `delta sinks=0`."""
    name, _, rest = method.partition(":")
    others = [
        option for option in rest.split(",") if option and option.split("=")[0].strip() not in ("budget", "window")
    ]
    return " ".join([name or "?", *others])


def budget_of(method: str) -> int | None:
    """The tokens that a method keeps, as given or by default; None where it has no such number."""
    try:
        config = parse(method)
    except DeltaKVError:  # a baseline, or a plan file that is on another machine
        return next(
            (
                int(option.split("=")[1])
                for option in method.partition(":")[2].split(",")
                if option.startswith("budget=") and option.split("=")[1].isdecimal()
            ),
            None,
        )
    return getattr(config, "budget", getattr(config, "window", None))


def label_of(method: str) -> str:
    budget = budget_of(method)
    return "" if budget is None else str(budget)


def _form(points: Sequence[Point]) -> str:
    return "{:,.0f}" if max(point.x for point in points) >= 5 else "{:,.1f}"


def _picks(label: str, record: PickRecord) -> str:
    panels = "".join(
        f'<figure><figcaption>Δ-layer {layer}</figcaption><img class="picks" alt="pages kept by Δ-layer {layer}" '
        f'src="data:image/png;base64,{_picks_png(record, layer)}"><div class="axis"><span>page 0 at the top, '
        f"{record.pages_at(record.steps - 1) - 1} below</span><span>{record.steps} steps →</span></div></figure>"
        for layer in record.picks
    )
    recall = sum(record.recall.values()) / len(record.recall) if record.recall else None
    head = f"{label}, last {record.steps:,} of {record.context:,} tokens"
    said = (
        f"{record.method}: picks hold {recall:.1%} of full attention's mass, mean of layers"
        if recall
        else record.method
    )
    key = "".join(
        f'<span><i style="background:{colour}"></i>{name}</span>'
        for name, colour in (("picked by score", ACCENT), ("sink", SINK), ("recent", RECENT), ("not kept", _GREY))
    )
    return _block(head, said, f'<p class="legend">{key}</p><div class="panels">{panels}</div>', "")


_GREY = "#9ca3af80"


def _picks_png(record: PickRecord, layer: int) -> str:
    """A pixel a page and step; where no page is yet, nothing."""
    import numpy as np
    from matplotlib.colors import to_rgba
    from matplotlib.image import imsave

    from deltakv.report.picks import picks_image

    colours = np.array([to_rgba(name) for name in ("#00000000", _GREY, SINK, RECENT, ACCENT)])
    file = io.BytesIO()
    imsave(file, (colours[picks_image(record, layer)] * 255).astype(np.uint8), format="png")
    return base64.b64encode(file.getvalue()).decode()


def _sources(sources: Sequence[Entry]) -> str:
    heads = ["file", "model", "where", "date", "commit", "versions"]
    rows = ([str(source[name]) for name in heads] for source in sources)
    return f'<div class="words">{table(heads, rows)}</div>'


def _groups(entries: Sequence[Entry], *names: str) -> list[list[Entry]]:
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry.get(name) for name in names), []).append(entry)
    return list(groups.values())


def _section(title: str, says: str, blocks: Iterable[str]) -> str:
    inside = "".join(blocks)
    return f'<h2>{escape(title)}</h2><p class="muted">{escape(says)}</p>{inside}' if inside else ""


def _block(head: str, says: str, drawn: str, table: str) -> str:
    said = f"<p>{escape(says)}</p>" if says else ""
    return f'<article><h3>{escape(head)}</h3>{said}<div class="charts">{drawn}</div>{table}</article>'


def _folded(table: str) -> str:
    return f"<details><summary>Numbers</summary>{table}</details>"
