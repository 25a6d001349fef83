"""`deltakv calibrate`: the best plan for a model and a text, at the cost of DELTA's paper's."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltakv.cli import options
from deltakv.cli.calibrated_method import base_method, own_plan, standard_method
from deltakv.cli.prompts import read_text
from deltakv.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltakv.bench.layer_times import LayerTimes
    from deltakv.config import Delta
    from deltakv.evals.paid import Paid

COSTS = ("tokens", "time")


def calibrate(
    model: options.Model = options.DEFAULT_MODEL,
    method: Annotated[
        str,
        typer.Option(help="What is calibrated, as other commands take it, but for plan and budget, which are found."),
    ] = "delta",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file, as yours are; several times for several (default: built in)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Write the plan to this file.")] = Path("plan.json"),
    context: Annotated[int, typer.Option(min=2, help="Tokens before and at the positions that are evaluated.")] = 4000,
    budget: Annotated[
        int, typer.Option(min=16, help="Tokens that a sparse layer of the paper's plan attends to: this sets the cost.")
    ] = 1024,
    sinks: Annotated[
        int | None, typer.Option(min=0, help="The first ones of a row, always kept (default: the method's).")
    ] = None,
    reading: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Layers that read everything, at the paper's plan's cost (default: its number, two more or fewer; "
            "where layers pick for themselves, from none to four).",
        ),
    ] = None,
    cost: Annotated[
        str,
        typer.Option(help="What a step may not cost more of: tokens that it attends to, or time, measured here."),
    ] = "tokens",
    batch: Annotated[int | None, typer.Option(min=1, help="With --cost time: rows that decode together (1).")] = None,
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
    """Finds the layers that should read everything on your model and text, under DELTA or another --method, by KL to
    full attention.

    The cost stays what it is: a step attends to no more tokens than under the paper's plan and --budget, or takes its
    attention no more time. Fewer layers that read everything leave more to the others, so the budget is found, too.
    What is found is confirmed on text that the search has not seen. Stopped, it goes on where it was when it is started
    again.

    [bold]Example:[/bold] deltakv calibrate --model smollm2 --context 4000 --out smollm2.json
    """
    from deltakv.config import Full

    base = base_method(method, budget, sinks)
    standard, size = standard_method(base, budget), base.page_size
    state = state if state is not None else out.with_name(out.name + ".state")
    options.check_output(out, state)
    if cost not in COSTS:
        raise InputError(f"--cost {cost!r} is not one of {', '.join(COSTS)}")
    if batch is not None and cost != "time":
        raise InputError(f"--batch {batch} belongs to --cost time; attended tokens are a row's own")
    if cost == "time" and base is not standard:
        raise InputError(
            f"--cost time rests on times of DELTA's own picks, not of {base.algorithm}'s; use --cost tokens"
        )
    # A method that evicts reads everything until it does so for the first time.
    lag: int = getattr(base, "lag", 0)
    if (fewest := min(quick, positions, confirm_positions)) <= lag:
        raise InputError(
            f"{fewest} positions are over before {base.algorithm} drops anything (lag={lag}); give --quick, "
            "--positions and --confirm-positions of more than that, or a smaller lag"
        )
    longest = max(positions, confirm_positions)
    if longest >= context:
        raise InputError(f"--context {context} must be more than the {longest} positions that are evaluated in it")
    if context - longest <= budget:
        raise InputError(
            f"at --context {context}, of which the last {longest} tokens are evaluated, a budget of {budget} leaves "
            "nothing out at first; give a longer context"
        )
    told = [(str(path), read_text(path)) for path in text or []]

    from deltakv.cli.checks import check_methods
    from deltakv.integrations.hf.support import model_shape
    from deltakv.loading.model import check_length
    from deltakv.plan import model_fingerprint, paper

    config = check_methods(model, [], lambda config: check_length(context + 1, config, f"--context {context}"))
    depth = len(model_shape(config).planned_layers)
    if reading is not None and not 1 <= reading < depth:
        raise InputError(f"--reading {reading} of {depth} layers leaves none to be sparse; give at most {depth - 1}")
    known = paper(depth)
    if reading is not None:
        counts: Sequence[int] = [reading]
    elif base.attends_to_own_pick:
        counts = range(known.reads_in_full)
    else:
        counts = range(known.reads_in_full - 2, known.reads_in_full + 3)

    from deltakv.bench.layer_times import LayerTimes
    from deltakv.bench.provenance import provenance
    from deltakv.evals import texts
    from deltakv.evals.calibration import Calibration, Tried, confirm, settings, share, written
    from deltakv.evals.paid import AttendedTokens, Paid
    from deltakv.evals.windows import cut, open_window

    told = told or [(texts.BUILTIN_NAME, texts.builtin_text())]
    depends_on = {
        "model": model_fingerprint(config),
        "path": model,
        "texts": {name: hashlib.sha256(content.encode()).hexdigest() for name, content in told},
        "options": [written(base), context, budget, reading, longest, windows, positions, quick, dtype],
        "cost": cost if cost == "tokens" else [cost, batch or 1, device, threads],
    }
    lengths = (context - longest, context)

    def affordable(times: LayerTimes | None) -> tuple[Paid, list[int]]:
        paid = Paid(times or AttendedTokens(), known, budget, lengths)
        readings = paid.readings(base, counts)
        if readings:
            return paid, readings
        why = f"with --budget {budget}{'' if reading is None else f' and --reading {reading}'} nothing would be left "
        why += f"out, or nothing left to read, at the cost of the paper's plan {known}"
        if base.attends_to_own_pick and reading is None:
            raise InputError(
                f"{why}: what layers of {base.algorithm} look at is too much for it; give a larger --budget"
            )
        if times is None:
            raise InputError(f"{why}; give another --reading, or none")
        tried.forget()
        raise InputError(
            f"{why}: at this size reading less saves no time; give a longer --context, a larger --batch, or --cost "
            "tokens"
        )

    # All of this refuses before the model is loaded.
    tried = Tried(state, depends_on)
    if cost == "tokens":
        paid, readings = affordable(None)
    loaded = options.load(model, dtype, device, threads)
    ids = [texts.all_tokens(loaded.tokenizer, content) for _, content in told]
    pieces, unseen = cut(ids, [name for name, _ in told], context, windows)
    with options.progress() as bars:
        times = None
        if cost == "time":
            advance = _on(bars, bars.add_task("timing attention", total=None))
            said = tried.timed(lambda: _layer_times(loaded.model, standard, lengths, batch or 1, advance).numbers())
            times = LayerTimes.load(said)
            paid, readings = affordable(times)
        task = bars.add_task("reading", total=len(pieces) * context)
        places = [open_window(loaded.model, piece, positions, size, _on(bars, task)) for piece in pieces]
        task = bars.add_task("search", total=None)
        work = Calibration(loaded.model, base, paid, readings, places, quick, tried, _on(bars, task))
        best = work.run()
        del work, places
        task = bars.add_task("confirming", total=len(unseen) * (context + 4 * confirm_positions))
        places = [open_window(loaded.model, piece, confirm_positions, size, _on(bars, task)) for piece in unseen]
        with_sinks = replace(standard, plan=str(known))
        own = own_plan(base, paid)
        compared = {
            "full": Full(page_size=size),
            **own,
            "the paper's settings": replace(with_sinks, sinks=0),
            "the paper's plan": with_sinks,
            "calibrated": best,
        }
        found = [confirm(loaded.model, name, method, places, _on(bars, task)) for name, method in compared.items()]
    results = [one.numbers for one in found]
    if times is not None:
        for result, one in zip(results, compared.values(), strict=True):
            result["attention_ms"] = paid.of(one.layer_plan(depth), context, getattr(one, "budget", context))
    gains = {one.name: share(found[-1].kl, one.kl) for one in found[1:-1]}
    plan = best.layer_plan(depth)
    facts: dict[str, Any] = {
        "made_for": depends_on["model"],
        "settings": settings(best),
        "method": written(best),
        **provenance(loaded.model),
        "model": loaded.name,
        "texts": depends_on["texts"],
        "context": context,
        "cost": cost,
        **({} if times is None else {"batch": batch or 1, "times": times.numbers()}),
        "pieces": len(pieces),
        "new_pages": results[-1]["new_pages"],
        "confirmed": results,
        **({"against_its_own_plan": gains[next(iter(own))]} if own else {}),
        "against_the_paper_s_plan": gains["the paper's plan"],
        "against_the_paper_s_settings": gains["the paper's settings"],
        "tried": tried.losses,
    }
    plan.save(out, **facts)
    tried.forget()
    from deltakv.report.tables import calibration_table, new_pages_line, print_table

    print_table(
        calibration_table(results), f"{loaded.name} after {context:,} tokens, on text that was not calibrated on"
    )
    print("pages of a pick that its layer's last pick, one token before, did not have:")
    for result in results[1:]:
        print(f"  {result['method']}: {new_pages_line(result['new_pages'])}")
    chosen = [f"{name} {value}" for name, value in settings(best).items() if name != "algorithm"]
    print(f"plan: {plan}, {', '.join(chosen)}")
    if lag:
        print(
            f"at first, for {lag} positions of each piece, {base.algorithm} reads everything: its row counts them, too"
        )
    for name, gain in gains.items():
        low, high = gain["interval"]
        print(f"its KL is {gain['kl_share']:.0%} of that of {name} (with 95%: {low:.0%} to {high:.0%})")
    print(f"use it: --method {best.algorithm}:plan={out}")


def _layer_times(model: Any, base: Delta, lengths: tuple[int, ...], batch: int, advance: Any) -> LayerTimes:
    """Those of a model on its device."""
    from deltakv.bench.layer_times import measure_layer_times
    from deltakv.bench.op import Shape
    from deltakv.bench.random_model import kv_shape

    config = model.config.get_text_config()
    kv_heads, head_dim = kv_shape(config)
    shape = Shape(batch, max(lengths), config.num_attention_heads, kv_heads, head_dim, model.dtype, model.device)
    return measure_layer_times(shape, base, lengths, advance=advance)


def _on(bars: Any, task: Any) -> Any:
    return lambda count: bars.advance(task, count)
