"""`deltakv eval`: what a method does to a model's answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltakv.cli import options
from deltakv.errors import InputError

if TYPE_CHECKING:
    from deltakv.evals.evaluation import Folder
    from deltakv.evals.preparing import Settings

DEFAULT_METHODS = ("full", "delta")
STAGES = ("questions", "answers", "results")
TASK_HELP = (
    "gsm8k, math500, aime24, aime25, gpqa; needle or tracking (something to find in a long text, as in RULER); or "
    "perplexity. Without one, the run in --out goes on."
)


def evaluate(
    task: Annotated[str | None, typer.Option(help=TASK_HELP)] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; a run that was interrupted in it goes on.")] = Path(
        "eval"
    ),
    model: options.Model = options.DEFAULT_MODEL,
    method: Annotated[
        list[str] | None, typer.Option("--method", help=f"{options.METHOD_HELP} Give it several times.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A JSONL file or a Hub name (default: the task's own set).")] = None,
    examples: Annotated[
        str | None,
        typer.Option(help="Worked examples, likewise (default: the set's training split, or --data's first)."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question.")] = 0,
    shot_tokens: Annotated[
        int | None, typer.Option(min=1, help="Or as many as fit into that many tokens: 12000 for many-shot.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most that many questions.")] = None,
    context: Annotated[int, typer.Option(min=4, help="Tokens of a needle, tracking or perplexity text.")] = 4096,
    positions: Annotated[int, typer.Option(min=1, help="The last tokens, that perplexity is of.")] = 512,
    text: Annotated[
        Path | None, typer.Option(help="The text for these (default: Python's own language reference, built in).")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template (default: without examples).")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Of an answer (default: the task's own).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    seed: int = 0,
    stop_after: Annotated[
        str, typer.Option(help="questions, answers or results: prompts can be answered on another machine.")
    ] = "results",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Lets methods answer questions: accuracy with an interval, a paired test against full attention, and costs.

    Each answer is kept as soon as it is there: what was interrupted goes on with the same command, and loses nothing.

    [bold]Example:[/bold] deltakv eval --task gsm8k --data test.jsonl --examples train.jsonl --shots 8 --limit 100
    --method full --method delta --method quest --out gsm8k/
    """
    from deltakv.evals.evaluation import Folder, check_settings
    from deltakv.evals.preparing import Settings

    if stop_after not in STAGES:
        raise InputError(f"--stop-after {stop_after!r} is not one of {', '.join(STAGES)}")
    folder = Folder(out)
    if task is None:
        if (said := folder.asked()) is None:
            raise InputError(f"no --task, and no run in {out} to go on with; give one (see: deltakv eval --help)")
        settings = Settings(**said["settings"])
    else:
        settings = Settings(
            task=task, data=data, examples=examples, text=None if text is None else str(text), shots=shots,
            shot_tokens=shot_tokens, limit=limit, context=context, positions=positions, chat=chat,
            max_new_tokens=max_new_tokens, batch=batch, temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        settings.check()
        check_settings(folder, settings)
    names = list(dict.fromkeys(method or folder.methods() or DEFAULT_METHODS))
    _run(folder, settings, names, model, stop_after, (dtype, device, threads))


def _run(
    folder: Folder, settings: Settings, names: list[str], model: str, stop_after: str, how: tuple[str, str, int | None]
) -> None:
    from deltakv import loading
    from deltakv.cli.checks import check_methods, hint
    from deltakv.evals import evaluation

    methods = [(name, options.parse_method(name, model)) for name in names]
    config = check_methods(model, [chosen for _, chosen in methods])
    model_id = evaluation.fingerprint(config)
    loading.find_device(how[1])
    tokenizer = loading.load_tokenizer(loading.locate(model))
    prepared = None
    if stop_after != "answers" or folder.asked() is None:  # who only answers needs neither the data nor the harness
        prepared = _prepare(settings, tokenizer, stop_after)
    asked, facts = evaluation.find_questions(folder, prepared, model_id)
    run = evaluation.Run(folder, settings, facts, asked, methods)
    work = run.work(tokenizer, config)
    with folder.held():
        run.begin(model)
        if stop_after != "questions" and any(run.missing(name) for name in names):
            loaded = options.load(model, *how)
            journals = [run.journal(name, loaded.model) for name in names]
            options.say(_told(settings, facts, len(asked), work))
            with _progress() as progress:
                run.answer(loaded.model, loaded.tokenizer, work, journals, progress)
        if stop_after == "results":
            assert prepared is not None
            _show(run, prepared, model)
    hint(config, model, [chosen for _, chosen in methods])


def _prepare(settings: Settings, tokenizer: Any, stop_after: str) -> Any:
    from deltakv.cli.prompts import read_text
    from deltakv.evals.preparing import prepare

    if stop_after == "results" and settings.task not in ("needle", "tracking", "perplexity"):
        import math_verify  # noqa: F401  now, and not after hours of answering
    return prepare(settings, tokenizer, lambda path: read_text(Path(path)))


def _told(settings: Settings, facts: dict[str, Any], count: int, work: Any) -> str:
    """What is about to be asked, in one line."""
    said = f"{settings.task}: {count} questions of {facts['data']}, {facts['examples']} examples, "
    said += f"prompts of up to {work.longest:,} tokens"
    if work.shared:
        said += f", the first {work.shared:,} of them shared and prefilled once"
    return f"{said}, answers of up to {work.new_tokens:,}" if work.new_tokens else said


def _show(run: Any, prepared: Any, model: str) -> None:
    from deltakv.bench.provenance import provenance
    from deltakv.evals.journal import write_whole
    from deltakv.report.evaluation import evaluation_table
    from deltakv.report.tables import print_table

    results = run.results(prepared)
    facts = {"kind": "eval", "model": model, "task": run.settings.task, **run.facts}
    told = {**provenance(), **facts, "settings": asdict(run.settings), "results": results}
    write_whole(run.folder.results, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    title = f"{model} on {run.settings.task}, {len(run.asked)} questions of {run.facts['data']}"
    print_table(evaluation_table(results), title)
    options.say(f"json: {run.folder.results}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    with options.progress() as bars:

        def start(what: str, count: int) -> Callable[[int], None]:
            task = bars.add_task(what, total=count)
            return lambda done: bars.advance(task, done)

        yield start
