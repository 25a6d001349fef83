"""The typer application and its commands, one file each."""

from __future__ import annotations

from typing import Annotated

import typer

from deltakv.cli.bench import bench
from deltakv.cli.calibrate import calibrate
from deltakv.cli.compare import compare
from deltakv.cli.eval import evaluate
from deltakv.cli.generate import generate
from deltakv.cli.inspect import inspect
from deltakv.cli.plan import plan
from deltakv.cli.report import report
from deltakv.cli.serve import serve
from deltakv.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (generate, compare, calibrate, inspect, plan):
    app.command(no_args_is_help=False)(_command)
app.command("eval")(evaluate)
app.command()(report)
app.add_typer(bench, name="bench", help="Times decode steps, ops and whole answers, with random weights at any size.")
# What it does not know is vLLM's.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"deltakv {__version__}")
        raise typer.Exit


@app.callback()
def deltakv(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Sparse decoding (DELTA) for stock transformers models.

    A few layers read the whole KV cache and pick the pages that matter; all others read only these.

    [bold]Start with:[/bold] deltakv generate "Why is the sky blue?"
    """
