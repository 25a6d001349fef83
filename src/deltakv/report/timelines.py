"""Pictures of when the bus and the GPU do what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltakv.offload.timeline import Timeline
from deltakv.report.plots import ACCENT, BASE, INK, MUTED, RECENT, SINK, new_figure

COLOURS = {
    "weights": MUTED,
    "X": SINK,
    "KV": ACCENT,
    "recompute": RECENT,
    "rest": BASE,
    "moved": ACCENT,
    "kernels": BASE,
}
NAMES = {
    "weights": "weights cross",
    "X": "X crosses",
    "KV": "K and V cross",
    "recompute": "recomputing K and V",
    "rest": "rest of the layer",
    "moved": "copies to the device",
    "kernels": "kernels",
}
#: Layers that are shown, after a first one, which nothing was fetched ahead for.
LAYERS = 3


def timeline_plot(
    timelines: Sequence[tuple[str, Timeline]], title: str, path: Path, headline: str | None = None
) -> None:
    """Some layers of each timeline, one below the other on one scale of time. headline: None compares the last with the
    first. path: a .png, .svg or .pdf file."""
    height = 1.6 + 1.3 * len(timelines)
    figure = new_figure(11, height)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, timeline) in zip(panels, timelines, strict=True):
        _lanes(axis, timeline)
        axis.set_title(f"{name}: a step in {timeline.seconds * 1e3:,.1f} ms", loc="left", fontsize=9, color=INK)
    panels[-1].set_xlabel("ms", fontsize=9, color=MUTED)
    seen = {span.what for _, timeline in timelines for span in timeline.spans}
    handles = [panels[0].barh(0, 0, color=COLOURS[what], label=name) for what, name in NAMES.items() if what in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    ratio = timelines[0][1].seconds / timelines[-1][1].seconds if timelines[-1][1].seconds else 1.0
    if headline is None:
        headline = f"{timelines[-1][0]}: {ratio:.2f}x the speed of {timelines[0][0]}"
    figure.suptitle(f"{headline}\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.01, 1 - 0.36 / height, title, fontsize=8, color=MUTED, va="top")  # in the line left below: inches
    figure.savefig(path, dpi=150)


def _lanes(axis: Any, timeline: Timeline) -> None:
    layers = max((span.layer for span in timeline.spans), default=0)
    first = min(1, layers)
    shown = [span for span in timeline.spans if first <= span.layer < first + LAYERS]
    start = min((span.start for span in shown), default=0.0)
    for what, colour in COLOURS.items():
        for place, lane in enumerate(("GPU", "bus")):
            bars = [
                ((span.start - start) * 1e3, (span.stop - span.start) * 1e3)
                for span in shown
                if span.what == what and span.lane == lane
            ]
            axis.broken_barh(bars, (place - 0.35, 0.7), facecolors=colour, edgecolor="white", linewidth=0.3)
    axis.set_yticks([0, 1], ["GPU", "bus"])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0, labelsize=8)
