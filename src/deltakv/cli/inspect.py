"""`deltakv inspect`: a picture of what a method picks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakv.cli import options
from deltakv.cli.checks import check_methods, measured
from deltakv.cli.prompts import read_text
from deltakv.errors import InputError


def inspect(
    method: options.OneMethod = options.DEFAULT_METHOD,
    model: options.Model = options.DEFAULT_MODEL,
    text: options.TextFile = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 4000,
    steps: Annotated[int, typer.Option(min=1, help="The last tokens, shown as decode steps.")] = 128,
    out: Annotated[
        Path, typer.Option(help="The picture; a page of the same name, ending in .html, comes beside it.")
    ] = Path("inspect.png"),
    json_file: options.Json = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Draws which pages each Δ-layer picks over decode steps, and how much attention the picks hold.

    [bold]Example:[/bold] deltakv inspect --method delta:budget=512 --context 4000 --out picks.png
    """
    chosen = options.parse_method(method, model)
    if out.suffix != ".png":
        raise InputError(f"--out {out} must end in .png")
    page = out.with_suffix(".html")
    options.check_output(out, page, json_file)
    if steps >= context:
        raise InputError(f"--steps {steps} must be less than --context {context}: what comes before them is prefilled")
    import matplotlib  # noqa: F401  now, and not after the work

    told = read_text(text) if text is not None else None

    from deltakv.bench.provenance import provenance
    from deltakv.evals import texts
    from deltakv.evals.picks import record_picks
    from deltakv.loading import check_length
    from deltakv.report.page import picks_page
    from deltakv.report.picks import picks_plot

    config = check_methods(model, [chosen], lambda config: check_length(context, config, f"--context {context}"))
    loaded = options.load(model, dtype, device, threads)
    text_name = str(text) if text is not None else texts.BUILTIN_NAME
    ids = texts.first_tokens(loaded.tokenizer, told if told is not None else texts.builtin_text(), context, text_name)
    with options.progress() as bars:
        task = bars.add_task("reading the text", total=context)
        record = record_picks(
            loaded.model, loaded.tokenizer, method, chosen, ids, steps, lambda done: bars.advance(task, done)
        )
    label = f"{loaded.name} on {text_name}"
    picks_plot(record, label, out)
    picks_page(record, label, page)
    options.write_json(
        json_file, {**provenance(loaded.model), "model": loaded.name, "text": text_name, **record.numbers()}
    )
    print("attention mass inside the pick or window, by layer (1 is all of it):")
    for layer, share in record.recall.items():
        print(f"layer {layer:3}  recall {share:.3f}  {'#' * round(share * 40)}")
    print(f"picture: {out}\npage: {page}\n{measured(config, model)}")
