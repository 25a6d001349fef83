"""Plots that explain themselves: the title says what is seen, and values stand beside their marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltakv.report.tables import baseline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, ACCENT, BASE, SINK, RECENT = "#1f2328", "#6b7280", "#2563eb", "#9ca3af", "#d97706", "#059669"
#: Behind a label that may lie across a line.
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
#: A KL at or below this, in nats, is rounding.
KL_FLOOR = 1e-6


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A figure drawn without a display or pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", **options)


def comparison_plot(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Speed as a ratio to the baseline, beside the distance from full attention, a row a method.

    results: as in the JSON of `compare`. path: a .png, .svg or .pdf file.
    """
    timed = all(result["decode_tokens_per_s"] for result in results)
    figure = new_figure(11, 2.2 + 0.5 * len(results))
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    places = list(range(len(results)))[::-1]
    base = baseline(results)
    if timed:
        _speed_panel(axes[0], results, places, base)
    _fidelity_panel(axes[-1], results, places)
    axes[0].set_yticks(places, [_wrapped(result["method"]) for result in results])
    axes[0].set_ylim(-0.6, len(results) - 0.4)
    figure.suptitle(_headline(results, base, timed), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.supxlabel(title, fontsize=9, color=MUTED)
    figure.savefig(path, dpi=150)


def _headline(results: Sequence[dict[str, Any]], base: dict[str, Any], timed: bool) -> str:
    """What the picture shows, of the fastest method that is no baseline."""
    others = [result for result in results if result is not base and not _is_dense(result)]
    if not others:
        return "Decode speed and distance from full attention"
    best = max(others, key=lambda result: result["decode_tokens_per_s"] or 0)
    name = best["method"].split(":")[0]
    agrees = f"its next token is full attention's at {best['top1']:.0%} of positions"
    if not timed:
        return f"{name}: {agrees}"
    ratio = best["decode_tokens_per_s"] / base["decode_tokens_per_s"]
    return f"{name} decodes at {ratio:.2f}x the speed of {base['method']}; {agrees}"


def _speed_panel(axis: Any, results: Sequence[dict[str, Any]], places: list[int], base: dict[str, Any]) -> None:
    for place, result in zip(places, results, strict=True):
        speed = result["decode_tokens_per_s"]
        ratio = speed / base["decode_tokens_per_s"]
        colour = BASE if _is_dense(result) else ACCENT
        axis.barh(place, ratio, height=0.55, color=colour)
        label, aside = f"{ratio:.2f}x, {speed:.1f} tokens/s", {"xytext": (7, 0), "textcoords": "offset points"}
        axis.annotate(label, (ratio, place), **aside, va="center", fontsize=9, color=INK, bbox=PAPER)
    axis.axvline(1, color=MUTED, linewidth=0.8, linestyle=":", zorder=0.5)
    axis.set_xlabel(f"decode speed, ratio to {base['method']}\n(more is better)")
    axis.margins(x=0.35)
    axis.set_xlim(left=0)
    plain(axis)


def _fidelity_panel(axis: Any, results: Sequence[dict[str, Any]], places: list[int]) -> None:
    for place, result in zip(places, results, strict=True):
        colour = BASE if _is_dense(result) else ACCENT
        mean, p99 = (max(result[name], KL_FLOOR) for name in ("kl_mean", "kl_p99"))
        axis.plot([mean, p99], [place, place], color=colour, linewidth=1.5, solid_capstyle="butt")
        axis.plot(mean, place, "o", color=colour, markersize=8)
        axis.plot(p99, place, "|", color=colour, markersize=12)
        exact = result["kl_mean"] <= KL_FLOOR
        label = "same as full attention" if exact else f"KL {result['kl_mean']:.3g}, p99 {result['kl_p99']:.3g}"
        note = f"{label} · top-1 {result['top1']:.1%} · perplexity {result['perplexity']:.2f}"
        axis.text(0.01, place + 0.22, note, transform=axis.get_yaxis_transform(), fontsize=8, color=INK)
    axis.set_xscale("log")
    axis.set_xlim(KL_FLOOR / 2, max(10.0, *(result["kl_p99"] * 2 for result in results)))
    axis.set_xlabel("KL from full attention in nats, log scale (less is better)\ndot: mean, tick: 99th percentile")
    plain(axis)


def _is_dense(result: dict[str, Any]) -> bool:
    return result["method"].startswith(("full", "stock"))


def plain(axis: Any) -> None:
    """Takes off what an axis does not need."""
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0)
    axis.grid(axis="x", color="#e5e7eb", linewidth=0.7)
    axis.set_axisbelow(True)


def _wrapped(method: str, width: int = 26) -> str:
    """A method's name broken at its commas, so that long options do not eat the plot."""
    lines = [""]
    for piece in method.replace(":", ":\n").replace(",", ",\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
