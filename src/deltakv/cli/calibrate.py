"""`deltakv calibrate`: the best plan for a model and a text, at the cost of the paper's."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from deltakv.cli import options
from deltakv.cli.prompts import read_text
from deltakv.errors import InputError


def calibrate(
    model: options.Model = options.DEFAULT_MODEL,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file, as yours are; several times for several (default: built in)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Write the plan to this file.")] = Path("plan.json"),
    context: Annotated[int, typer.Option(min=2, help="Tokens before and at the positions that are evaluated.")] = 4000,
    budget: Annotated[int, typer.Option(min=16, help="Tokens that a sparse layer attends to.")] = 1024,
    sinks: Annotated[int, typer.Option(min=0, help="Of these the first ones of a row.")] = 16,
    reading: Annotated[
        int | None, typer.Option(min=1, help="Layers that read everything (default: as many as the paper's plan has).")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Pieces of text to calibrate on, and as many to confirm on.")] = 2,
    positions: Annotated[int, typer.Option(min=16, help="Positions of each piece.")] = 128,
    quick: Annotated[int, typer.Option(min=1, help="Positions of each piece for a first look.")] = 24,
    confirm_positions: Annotated[int, typer.Option(min=16, help="Positions of each piece to confirm on.")] = 512,
    state: Annotated[
        Path | None,
        typer.Option(help="Where a search that was stopped goes on from (default: OUT with .state behind)."),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Finds the layers that should read everything on your model and text, by KL to full attention.

    The cost stays what it is: as many layers as in the paper's plan read the whole cache. What is found is confirmed on
    text that the search has not seen. Stopped, it goes on where it was when it is started again.

    [bold]Example:[/bold] deltakv calibrate --model smollm2 --context 4000 --out smollm2.json
    """
    from deltakv.config import Delta, Full

    base = Delta(budget=budget, sinks=sinks, recent=min(128, (budget - sinks) // 32 * 16), min_context=0)
    state = state if state is not None else out.with_name(out.name + ".state")
    options.check_output(out, state)
    longest = max(positions, confirm_positions)
    if longest >= context:
        raise InputError(f"--context {context} must be more than the {longest} positions that are evaluated in it")
    if context <= budget:
        raise InputError(f"at --context {context} a budget of {budget} leaves nothing out; give a longer context")
    told = [(str(path), read_text(path)) for path in text or []]

    from deltakv.cli.checks import check_methods
    from deltakv.integrations.hf.support import model_shape
    from deltakv.loading.model import check_length
    from deltakv.plan import model_fingerprint, paper

    config = check_methods(model, [], lambda config: check_length(context + 1, config, f"--context {context}"))
    depth = len(model_shape(config).planned_layers)
    reading = paper(depth).reads_in_full if reading is None else reading
    if not 1 <= reading < depth:
        raise InputError(f"--reading {reading} of {depth} layers leaves none to be sparse; give at most {depth - 1}")

    from deltakv.bench.provenance import provenance
    from deltakv.evals import texts
    from deltakv.evals.calibration import Calibration, Tried, confirm, share, written
    from deltakv.evals.windows import cut, open_window

    told = told or [(texts.BUILTIN_NAME, texts.builtin_text())]
    depends_on = {
        "model": model_fingerprint(config),
        "path": model,
        "texts": {name: hashlib.sha256(content.encode()).hexdigest() for name, content in told},
        "options": [context, budget, sinks, reading, windows, positions, quick, dtype],
    }
    tried = Tried(state, depends_on)  # refuses before the model is loaded
    loaded = options.load(model, dtype, device, threads)
    ids = [texts.all_tokens(loaded.tokenizer, content) for _, content in told]
    pieces, unseen = cut(ids, [name for name, _ in told], context, windows)
    page_size = base.page_size
    with options.progress() as bars:
        task = bars.add_task("reading", total=len(pieces) * context)
        places = [open_window(loaded.model, piece, positions, page_size, _on(bars, task)) for piece in pieces]
        task = bars.add_task("search", total=None)
        best = Calibration(loaded.model, base, depth, reading, places, quick, tried, _on(bars, task)).run()
        del places
        task = bars.add_task("confirming", total=len(unseen) * (context + 2 * confirm_positions))
        places = [open_window(loaded.model, piece, confirm_positions, page_size, _on(bars, task)) for piece in unseen]
        known = replace(base, plan=str(paper(depth)))
        found = [
            confirm(loaded.model, name, method, places, _on(bars, task))
            for name, method in (("full", Full()), ("the paper's plan", known), ("calibrated", best))
        ]
    results = [one.numbers for one in found]
    gain = share(found[2].kl, found[1].kl)
    plan = best.layer_plan(depth)
    facts: dict[str, Any] = {
        "made_for": depends_on["model"],
        "method": written(best),
        **provenance(loaded.model),
        "model": loaded.name,
        "texts": depends_on["texts"],
        "context": context,
        "pieces": len(pieces),
        "confirmed": results,
        "against_the_paper_s_plan": gain,
        "tried": tried.losses,
    }
    plan.save(out, **facts)
    tried.forget()
    from deltakv.report.tables import calibration_table, print_table

    print_table(
        calibration_table(results), f"{loaded.name} after {context:,} tokens, on text that was not calibrated on"
    )
    low, high = gain["interval"]
    print(f"plan: {plan}")
    print(f"its KL is {gain['kl_share']:.0%} of that of the paper's plan (with 95%: {low:.0%} to {high:.0%})")
    print(f"use it: --method {written(best).replace(f'plan={plan}', f'plan={out}')}")


def _on(bars: Any, task: Any) -> Any:
    return lambda count: bars.advance(task, count)
