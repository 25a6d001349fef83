"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

#: What speed is compared with, the first that was run: the fair baseline first.
BASELINE_ORDER = ("full", "stock-static", "stock")


def calibration_table(results: Sequence[dict[str, Any]]) -> Table:
    """Plans as rows. results: as `confirmed` in a plan file; attention of a step where its time was the cost."""
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("method", overflow="fold", min_width=12)
    timed = "attention_ms" in results[0]
    for heading in ("attended", "KL mean", "with 95%", "KL p99", "top-1", "perplexity", "recall"):
        table.add_column(heading, justify="right")
    if timed:
        table.add_column("attention", justify="right")
    for result in results:
        table.add_row(
            result["method"],
            f"{result['attended_tokens']:,.0f}",
            f"{result['kl_mean']:.4f}",
            "{:.4f}-{:.4f}".format(*result["kl_interval"]),
            f"{result['kl_p99']:.3f}",
            f"{result['top1']:.1%}",
            f"{result['perplexity']:.2f}",
            _number(result["recall"], "{:.3f}"),
            *([f"{result['attention_ms']:.2f} ms"] if timed else []),
        )
    return table


def new_pages_line(shares: dict[str, float]) -> str:
    """By layer that picks, the share of a pick that is new at each step. shares: as `new_pages` in a plan file."""
    return ", ".join(f"layer {layer} {share:.1%}" for layer, share in shares.items()) or "no layer picks"


def baseline(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result that others are compared with: our own full attention, else stock, else the first."""
    by_name = {result["method"].split(":")[0]: result for result in results}
    return next((by_name[name] for name in BASELINE_ORDER if name in by_name), results[0])


def comparison_table(results: Sequence[dict[str, Any]]) -> Table:
    """Methods as rows. results: as in the JSON of `compare`."""
    from rich.table import Table

    base = baseline(results)
    table = Table(header_style="bold")
    table.add_column("method", overflow="fold", min_width=12)
    headings = ["tokens/s", f"vs {base['method']}", "attended", "KL mean", "KL p99", "top-1", "perplexity"]
    headings += ["recall", "KV", "peak"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        recall = result["recall_by_layer"].values()
        speed, base_speed = result["decode_tokens_per_s"], base["decode_tokens_per_s"]
        table.add_row(
            result["method"],
            _number(speed, "{:.1f}"),
            f"{speed / base_speed:.2f}x" if speed and base_speed else "",
            _number(result["attended_tokens"], "{:,.0f}"),
            _number(result["kl_mean"], "{:.4f}"),
            _number(result["kl_p99"], "{:.3f}"),
            _number(result["top1"], "{:.1%}"),
            _number(result["perplexity"], "{:.2f}"),
            f"{sum(recall) / len(recall):.3f}" if recall else "",
            mebibytes(result["kv_bytes"]),
            mebibytes(result["peak_memory_bytes"]),
        )
    table.caption = (
        "attended: tokens a step and row, over all layers · KL: nats, from full attention · "
        "recall: full attention's mass inside the pick, mean of the layers that read a part · peak: a fresh process"
    )
    if base["decode_tokens_per_s"] and not all(result["decode_tokens_per_s"] for result in results):
        table.caption += " · no speed: the steps that are timed are over before such a method drops anything"
    table.caption_justify = "left"
    return table


def plan_table(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> Table:
    """A plain table whose first two columns are text and the rest numbers."""
    from rich.table import Table

    table = Table(header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table, title: str) -> None:
    """To stdout under its title; wide enough to keep numbers whole when it is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(title, soft_wrap=True, highlight=False, markup=False)
    console.print(table)


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
