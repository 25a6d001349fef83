"""Pages that need nothing else: templates filled, and the page of what a method picks."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltakv.evals.picks import PickRecord

#: Pages of text listed under each SELECT layer.
MOST_PICKED = 8


def picks_page(record: PickRecord, model: str, path: Path) -> None:
    """Writes the page."""
    data = {
        "pageSize": record.page_size,
        "steps": record.steps,
        "pages": [record.pages_at(step) for step in range(record.steps)],
        "sinkPages": record.sink_pages,
        "recentPages": record.recent_pages,
        "layers": [{"layer": layer, "picks": rows} for layer, rows in record.picks.items()],
        "texts": record.page_texts,
    }
    filled = {
        "TITLE": f"What {record.method.split(':')[0]} picks",
        "MODEL": model,
        "METHOD": record.method,
        "PLAN": record.plan,
        "STEPS": f"{record.steps:,}",
        "CONTEXT": f"{record.context:,}",
        "PAGE_SIZE": str(record.page_size),
    }
    made = {
        "RECALL": _recall_bars(record.recall),
        "MOST_PICKED": "".join(_most_picked(record, layer) for layer in record.picks),
        # "</" inside a string would end the script element.
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
    }
    path.write_text(fill("picks.html", filled, made), encoding="utf-8")


def fill(template: str, texts: Mapping[str, str], made: Mapping[str, str]) -> str:
    """A template of this room with its {{NAMES}} filled in. texts: are escaped. made: HTML already."""
    values = {name: html.escape(text) for name, text in texts.items()} | dict(made)
    blank = resources.files("deltakv.report").joinpath(template).read_text(encoding="utf-8")
    # All in one pass: what is filled in may hold what looks like a name.
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda found: values[found.group(1)], blank)


def _recall_bars(recall: dict[int, float]) -> str:
    return "".join(
        f'<div class="bar"><span>{layer}</span><i style="width:{share:.1%}"></i><b>{share:.3f}</b></div>'
        for layer, share in recall.items()
    )


def _most_picked(record: PickRecord, layer: int) -> str:
    rows = ""
    for page, share in record.most_picked(layer, MOST_PICKED):
        says = html.escape(" ".join(record.page_texts[page].split()))
        rows += f"<tr><td>{page}</td><td>{share:.0%}</td><td>{says}</td></tr>"
    return (
        f"<h3>Δ-layer {layer}</h3>"
        "<table><thead><tr><th>page</th><th>steps</th><th>what it says</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
