"""`deltakv serve`: vLLM's OpenAI server with deltakv in it."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from deltakv.cli import options
from deltakv.errors import InputError


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a Hub name (owner/name), a GGUF file, or smollm2.")],
    method: options.OneMethod = options.DEFAULT_METHOD,
    budget: Annotated[int | None, typer.Option(help="Short for --method delta:budget=...", min=1)] = None,
    tp_selection: Annotated[
        str, typer.Option(help="Picks under tensor parallelism: global (by all heads) or local (without talking).")
    ] = "global",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the command, and leave.")] = False,
) -> None:
    """Serves a model with vLLM, sparse at decode steps; needs deltakv\\[vllm].

    [bold]Example:[/bold] deltakv serve smollm2 --budget 512 --port 8000 --max-model-len 4096

    Options that are not listed here go to vLLM as they are (vllm serve --help=all); put them after the model.
    """
    if model.startswith("-"):
        raise InputError(f"the model comes first: deltakv serve MODEL {model} ...")
    if budget is not None:
        method += f"{',' if ':' in method else ':'}budget={budget}"
    chosen = options.parse_method(method, model)
    from deltakv import loading
    from deltakv.integrations.vllm.settings import Settings

    settings = Settings(chosen, tp_selection)
    path = loading.locate(model)
    # The check runs vLLM's config code in this process; what that sets and logs is not for the server to inherit.
    environment = dict(os.environ)
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    with options.status("checking"):
        from deltakv.integrations.vllm import versions

        versions.require()
        from deltakv.integrations.vllm import server

        command = server.command(path, model, settings, context.args)
    if dry_run:
        print(shlex.join(command))
        return
    os.execve(command[0], command, environment)  # signals and exit codes are the server's own
