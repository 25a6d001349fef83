"""Tables and plots of `deltakv bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltakv.report.plots import ACCENT, BASE, INK, MUTED, PAPER, new_figure, plain

if TYPE_CHECKING:
    from rich.table import Table

#: Methods that attend to everything: what a sparse one is compared with is the best of them.
DENSE = ("full", "stock-static")


def best_dense(results: Sequence[dict[str, Any]], value: str) -> float | None:
    """The least `value` of the results that attend to everything, if there are any."""
    return min((result[value] for result in results if _is_dense(result)), default=None)


def step_table(results: Sequence[dict[str, Any]], bandwidth: float) -> Table:
    """Contenders as rows. results: as in the JSON of `bench step`. bandwidth: bytes a second."""
    table = _table("method", "ms", "middle half", "GB", "floor ms", "of floor", "vs best full", "generate ms")
    best = best_dense(results, "median_ms")
    for result in results:
        table.add_row(
            result["method"],
            f"{result['median_ms']:.3f}",
            "{:.3f}-{:.3f}".format(*result["quartiles_ms"]),
            f"{result['bytes'] / 1e9:.2f}",
            f"{result['floor_ms']:.3f}",
            f"{result['share_of_floor']:.0%}",
            f"{best / result['median_ms']:.2f}x" if best else "",
            f"{result['generate_ms']:.3f}" if result["generate_ms"] else "",
        )
    table.caption = (
        "ms: forward, LM head and argmax, one token a row, median · "
        f"floor: the bytes that must be read, at the {bandwidth / 1e12:.2f} TB/s of a copy in this run · "
        "generate: a step of its loop, all included"
    )
    table.caption_justify = "left"
    return table


def kernel_table(result: dict[str, Any], rows: int = 20) -> Table:
    """The kernels of one contender's step, those that took longest first."""
    table = _table("kernel", "calls", "us", "of the step")
    for kernel in result["kernels"][:rows]:
        share = kernel["microseconds"] / (1e3 * result["median_ms"])
        table.add_row(kernel["name"][:90], str(kernel["calls"]), f"{kernel['microseconds']:.1f}", f"{share:.1%}")
    return table


def part_table(result: dict[str, Any]) -> Table:
    """What one contender's kernels do, beside what they must read."""
    table = _table("part", "calls", "us", "GB", "floor us", "of floor")
    for part in result["parts"]:
        share = f"{part['floor_us'] / part['microseconds']:.0%}" if part["bytes"] and part["microseconds"] else ""
        bytes_read = f"{part['bytes'] / 1e9:.2f}" if part["bytes"] else ""
        floor = f"{part['floor_us']:.0f}" if part["bytes"] else ""
        table.add_row(part["part"], str(part["calls"]), f"{part['microseconds']:.0f}", bytes_read, floor, share)
    return table


def op_table(results: Sequence[dict[str, Any]], bandwidth: float) -> Table:
    """Ops as rows. results: as in the JSON of `bench op`."""
    table = _table("op", "us", "middle half", "MB", "floor us", "of floor")
    for result in results:
        low, high = result["quartiles_ms"]
        table.add_row(
            result["op"],
            f"{1e3 * result['median_ms']:.1f}",
            f"{1e3 * low:.1f}-{1e3 * high:.1f}",
            f"{result['bytes'] / 1e6:.2f}",
            f"{1e3 * result['floor_ms']:.1f}",
            f"{result['share_of_floor']:.0%}",
        )
    table.caption = f"floor: the bytes that must be moved, at the {bandwidth / 1e12:.2f} TB/s of a copy in this run"
    table.caption_justify = "left"
    return table


def sweep_table(results: Sequence[dict[str, Any]]) -> Table:
    """A row a batch and context, a column a method."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    table = _table("batch", "context", *[f"{method}, ms" for method in methods], "best vs best full")
    for batch, context in dict.fromkeys((result["batch"], result["context"]) for result in results):
        here = [result for result in results if (result["batch"], result["context"]) == (batch, context)]
        times = {result["method"]: result["median_ms"] for result in here}
        best, sparse = best_dense(here, "median_ms"), [r["median_ms"] for r in here if not _is_dense(r)]
        cells = [f"{times[method]:.3f}" if method in times else "" for method in methods]
        ratio = f"{best / min(sparse):.2f}x" if best and sparse else ""
        table.add_row(str(batch), f"{context:,}", *cells, ratio)
    return table


def trend_table(trends: Sequence[dict[str, Any]]) -> Table:
    """A row a batch and method. trends: as `bench.sweep.trends` gives them."""
    table = _table("batch", "method", "ms per 1,000 tokens", "to dense", "never slower from", "slower at worst")
    for trend in trends:
        slope, ratio, start = trend["slope_ms"], trend["slope_ratio"], trend["never_slower_from"]
        worst = trend["worst"]
        table.add_row(
            str(trend["batch"]),
            trend["method"],
            f"{slope:.4f}" if slope is not None else "",
            f"{ratio:.2f}" if ratio is not None else "",
            f"{start:,}" if start is not None else "",
            f"{max(worst, 0):.1%}" if worst is not None else "",
        )
    return table


def generation_table(results: Sequence[dict[str, Any]]) -> Table:
    """Contenders as rows. results: as in the JSON of `bench generate`."""
    table = _table("method", "seconds", "tokens/s", "ms a step", "vs best full")
    best = best_dense(results, "seconds")
    for result in results:
        table.add_row(
            result["method"],
            f"{result['seconds']:.1f}",
            f"{result['tokens_per_s']:,.0f}",
            f"{result['ms_a_step']:.3f}",
            f"{best / result['seconds']:.2f}x" if best else "",
        )
    return table


def step_plot(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """A bar a contender, what cannot be undercut in it a darker part. path: a .png, .svg or .pdf file."""
    figure = new_figure(9, 1.8 + 0.5 * len(results))
    axis = figure.subplots()
    places = range(len(results))[::-1]
    for place, result in zip(places, results, strict=True):
        colour = BASE if _is_dense(result) else ACCENT
        axis.barh(place, result["median_ms"], height=0.55, color=colour, alpha=0.55)
        axis.barh(place, result["floor_ms"], height=0.55, color=colour)
        label = f"{result['median_ms']:.2f} ms, floor {result['floor_ms']:.2f}"
        axis.annotate(
            label, (result["median_ms"], place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(places, [result["method"] for result in results])
    axis.set_xlabel("milliseconds a decode step (less is better); dark: the floor, by bytes")
    axis.margins(x=0.3)
    plain(axis)
    best, sparse = best_dense(results, "median_ms"), [r["median_ms"] for r in results if not _is_dense(r)]
    headline = "A decode step beside its floor"
    if best and sparse:
        headline = f"A decode step is {best / min(sparse):.2f}x as fast as with the best full attention"
    figure.suptitle(headline, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.supxlabel(title, fontsize=9, color=MUTED)
    figure.savefig(path, dpi=150)


def sweep_plot(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Step time over context, a panel a batch, a line a method. path: a .png, .svg or .pdf file."""
    batches = list(dict.fromkeys(result["batch"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    figure = new_figure(4.2 * len(batches) + 1, 4.4)
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for index, method in enumerate(methods):
            points = sorted(
                (result["context"], result["median_ms"])
                for result in results
                if (result["method"], result["batch"]) == (method, batch)
            )
            if not points:
                continue
            dense = method.split(":")[0] in DENSE
            style = {"color": BASE if dense else ACCENT, "linestyle": ("-", "--", ":", "-.")[index % 4]}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
            axis.annotate(
                method, points[-1], xytext=(-4, 6), textcoords="offset points", ha="right", fontsize=9, bbox=PAPER
            )
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:,.0f}k")
        axis.set_xlabel("tokens of context")
        axis.set_title(f"batch {batch}", fontsize=10, color=INK)
        axis.set_ylim(bottom=0)
        plain(axis)
    figure.axes[0].set_ylabel("milliseconds a decode step")
    figure.suptitle("Step time over context", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.supxlabel(title, fontsize=9, color=MUTED)
    figure.savefig(path, dpi=150)


def _is_dense(result: dict[str, Any]) -> bool:
    return result["method"].split(":")[0] in DENSE


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column(first, overflow="fold", min_width=12)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
