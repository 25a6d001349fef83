"""The picture of what a method picks, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakv.report.plots import ACCENT, INK, MUTED, RECENT, SINK, new_figure

if TYPE_CHECKING:
    from deltakv.evals.picks import PickRecord

KINDS = ("sink", "recent", "picked")
#: Panels beside each other before a second row starts.
COLUMNS = 4


def picks_plot(record: PickRecord, model: str, path: Path) -> None:
    """Pages over steps for each SELECT layer, and the recall of the layers that read a part: by a pick, or a window."""
    from matplotlib.patches import Patch

    layers = list(record.picks)
    across = min(len(layers), COLUMNS)
    down = -(-len(layers) // across)
    figure = new_figure(max(8.0, 2.9 * across), 3.6 * down + 3.2)
    grid = figure.add_gridspec(down + 2, across, height_ratios=[0.1] + [3.4] * down + [1.7])
    for index, layer in enumerate(layers):
        axis = figure.add_subplot(grid[1 + index // across, index % across])
        _picks_panel(axis, record, layer)
        if index % across == 0:
            axis.set_ylabel(f"page of {record.page_size} tokens (0 = start of the text)")
    _recall_panel(figure.add_subplot(grid[1 + down, :]), record.recall, layers)
    colours = {
        "picked by score": ACCENT,
        "sink, always kept": SINK,
        "recent, always kept": RECENT,
        "not kept": "#e5e7eb",
    }
    key = figure.add_subplot(grid[0, :])
    key.axis("off")
    patches = [Patch(color=colour, label=label) for label, colour in colours.items()]
    key.legend(handles=patches, loc="center left", ncols=4, frameon=False, fontsize=9, borderaxespad=0)
    kept = np.mean([len(pages) / record.pages_at(s) for rows in record.picks.values() for s, pages in enumerate(rows)])
    figure.suptitle(
        f"Each Δ-layer keeps {kept:.0%} of {record.pages_at(record.steps - 1)} pages for the layers after it",
        x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.supxlabel(
        f"{model}, {record.method}, last {record.steps} of {record.context:,} tokens", fontsize=9, color=MUTED
    )
    figure.savefig(path, dpi=150)


def picks_image(record: PickRecord, layer: int) -> np.ndarray[Any, Any]:
    """uint8 [pages, steps]: 0 no such page yet, 1 not kept, 2 sink, 3 recent, 4 picked."""
    image = np.zeros((record.pages_at(record.steps - 1), record.steps), dtype=np.uint8)
    for step, pages in enumerate(record.picks[layer]):
        image[: record.pages_at(step), step] = 1
        for page in pages:
            image[page, step] = 2 + KINDS.index(record.kind(page, step))
    return image


def _picks_panel(axis: Any, record: PickRecord, layer: int) -> None:
    from matplotlib.colors import ListedColormap

    image = picks_image(record, layer)
    axis.imshow(
        image, aspect="auto", interpolation="nearest", vmin=0, vmax=4,
        cmap=ListedColormap(["white", "#e5e7eb", SINK, RECENT, ACCENT]),
    )  # fmt: skip
    axis.set_title(f"Δ-layer {layer}", fontsize=11, loc="left", color=INK)
    axis.set_xlabel("decode step")
    axis.spines[:].set_visible(False)


def _recall_panel(axis: Any, recall: dict[int, float], select: Sequence[int]) -> None:
    layers = list(recall)
    axis.bar(layers, list(recall.values()), color=ACCENT, width=0.7)
    for layer, share in recall.items():
        axis.text(
            layer,
            share,
            f"{share:.2f}"[1 if share < 0.995 else 0 :],
            ha="center",
            va="bottom",
            fontsize=7,
            color=INK,
        )
    for layer in select:
        axis.axvline(layer, color=MUTED, linewidth=0.8, linestyle=":")
        axis.text(layer, 1.13, f"Δ {layer}", ha="center", fontsize=8, color=MUTED)
    axis.set_ylim(0, 1.25)
    axis.set_yticks([0, 0.5, 1])
    axis.set_xlim(-0.7, max([*layers, *select]) + 0.7)
    axis.set_xlabel("layer (those without a bar attend to everything)")
    axis.set_ylabel("recall")
    axis.set_title(
        "Share of full attention's mass that the reused pick (or the window) holds", fontsize=11, loc="left", color=INK
    )
    axis.spines[["top", "right"]].set_visible(False)
