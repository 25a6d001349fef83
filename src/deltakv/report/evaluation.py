"""The table of `deltakv eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltakv.report.wording import chance

if TYPE_CHECKING:
    from rich.table import Table


def evaluation_table(results: Sequence[dict[str, Any]]) -> Table:
    """Methods as rows. results: as in the JSON of `eval`."""
    from rich.table import Table

    texts = "perplexity" in results[0]
    base = next((result["versus"]["method"] for result in results if result["versus"]), results[0]["method"])
    table = Table(header_style="bold")
    table.add_column("method", overflow="fold", min_width=12)
    headings = ["perplexity" if texts else "accuracy", f"to {base}"]
    headings += [] if texts else ["better/worse", "p", "new tokens", "cut off"]
    for heading in [*headings, "attended", "fewer", "seconds"]:
        table.add_column(heading, justify="right")
    for result in results:
        cells = _perplexity(result) if texts else _accuracy(result)
        attended, full = result["attended_tokens"], result["full_tokens"]
        cells += [f"{attended:,.0f}", f"{full / attended:.2f}x"] if attended else ["", ""]
        table.add_row(result["method"], *cells, f"{result['seconds']:,.1f}")
    table.caption = (
        "attended: tokens a step and row, over layers · fewer: than full attention at the same steps · intervals: 95%"
        + (", bootstrap over texts" if texts else " · better/worse: questions that changed sides · p: McNemar, exact")
    )
    table.caption_justify = "left"
    return table


def _accuracy(result: dict[str, Any]) -> list[str]:
    versus = result["versus"]
    cells = [f"{result['accuracy']:.1%} ({_span(result['interval'], '{:.1%}')})"]
    cells += (
        [
            f"{versus['difference']:+.1%} ({_span(versus['interval'], '{:+.1%}')})",
            f"{versus['better']}/{versus['worse']}",
            chance(versus["p"]),
        ]
        if versus
        else [""] * 3
    )
    return [*cells, f"{result['new_tokens']:,.0f}", str(result["truncated"])]


def _perplexity(result: dict[str, Any]) -> list[str]:
    versus = result["versus"]
    cells = [f"{result['perplexity']:.3f} ({_span(result['interval'], '{:.2f}')})"]
    return [*cells, f"{versus['ratio']:.4f}x ({_span(versus['interval'], '{:.4f}')})" if versus else ""]


def _span(interval: Sequence[float], form: str) -> str:
    return " to ".join(form.format(end) for end in interval)
