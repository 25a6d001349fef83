"""`deltakv report`: one page of result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakv.cli import options
from deltakv.errors import InputError


def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="JSON of compare, bench, eval, inspect or calibrate.")
    ],
    out: Annotated[Path, typer.Option(help="The page; it needs no other file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its headline.")] = "What sparse decoding gives, and what it costs",
) -> None:
    """Makes one self-contained HTML page: accuracy and KL against attended tokens, step times, picks.

    [bold]Example:[/bold] deltakv report gsm8k/results.json compare.json sweep.json --out report.html
    """
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {out} must end in .html")
    options.check_output(out)

    from deltakv.report.results import read_results
    from deltakv.report.summary import summary_page

    out.write_text(summary_page(read_results(files), title), encoding="utf-8")
    print(f"page: {out}")
