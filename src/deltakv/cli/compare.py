"""`deltakv compare`: methods side by side on a model and a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from deltakv.cli import options
from deltakv.cli.prompts import read_text
from deltakv.errors import InputError

DEFAULT_METHODS = ("full", "delta")


def compare(
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"{options.METHOD_HELP} Also stock and stock-static. Give it several times."),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    text: options.TextFile = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of the text in the cache.")] = 4000,
    batch: Annotated[int, typer.Option(min=1, help="Rows that decode together, for speed and memory.")] = 1,
    positions: Annotated[int, typer.Option(min=1, help="The last tokens, on which fidelity is evaluated.")] = 512,
    steps: Annotated[int, typer.Option(min=0, help="Timed decode steps a method; 0 leaves speed out.")] = 32,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in a fresh process a method.")] = True,
    json_file: options.Json = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw this picture (default: beside --json, with the ending .png).")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Compares methods on a model and a text: speed, attended tokens, KL to full attention, recall, memory.

    [bold]Example:[/bold] deltakv compare --method full --method delta:budget=512 --context 4000 --json a.json
    """
    names = list(dict.fromkeys(method or DEFAULT_METHODS))
    from deltakv.bench.runners import BASELINES

    parsed = [name if name in BASELINES else options.parse_method(name, model, BASELINES) for name in names]
    if plot is None and json_file is not None:
        plot = json_file.with_suffix(".png")
    options.check_picture(plot, (".png", ".svg", ".pdf"))
    options.check_output(json_file, plot)
    if plot is not None:
        import matplotlib  # noqa: F401  now, and not after minutes of measuring
    told = read_text(text) if text is not None else None
    if told is not None and not told.strip():
        raise InputError(f"the file {text} is empty; give a text to measure on")

    from deltakv.bench.provenance import provenance
    from deltakv.cli.checks import check_methods, hint
    from deltakv.evals import texts
    from deltakv.evals.comparison import Comparison, Settings
    from deltakv.report.tables import comparison_table, print_table

    settings = Settings(context=context, batch=batch, positions=positions, steps=steps, memory=memory)
    config = check_methods(model, parsed, settings.check)
    loaded = options.load(model, dtype, device, threads)
    text_name = str(text) if text is not None else texts.BUILTIN_NAME
    told = told if told is not None else texts.builtin_text()
    ids = texts.first_tokens(loaded.tokenizer, told, context + 1, text_name)
    header = {
        **provenance(loaded.model),
        "model": loaded.name,
        "text": text_name,
        "positions": positions,
        "steps": steps,
    }
    with options.progress() as bars:

        def start(what: str, count: int) -> Callable[[int], None]:
            task = bars.add_task(what, total=count)
            return lambda done: bars.advance(task, done)

        work = Comparison(loaded.model, list(zip(names, parsed, strict=True)), ids, settings, start)
        entries = work.run(loaded.path, dtype, device)
    results = [entry.numbers() for entry in entries]
    title = f"{loaded.name} after {context:,} tokens of {text_name}, batch {batch}"
    print_table(comparison_table(results), title)
    hint(config, model, parsed)
    options.write_json(json_file, {**header, "results": results})
    if plot is not None:
        from deltakv.report.plots import comparison_plot

        comparison_plot(results, title, plot)
        options.say(f"plot: {plot}")
    if json_file is not None:
        options.say(f"json: {json_file}")
