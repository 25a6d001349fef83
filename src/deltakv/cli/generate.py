"""`deltakv generate`: text from a model under a method, with what it cost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltakv.cli import options, prompts
from deltakv.cli.checks import check_methods, hint
from deltakv.errors import DeltaKVError, InputError

if TYPE_CHECKING:
    from deltakv.evals.generation import Generation


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.")] = None,
    model: options.Model = options.DEFAULT_MODEL,
    method: options.OneMethod = options.DEFAULT_METHOD,
    file: Annotated[Path | None, typer.Option(help="A text file that comes before the prompt, or is it.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Many prompts in batches: one {"prompt": ..., "id": ...} a line.')
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of a JSONL that run together.")] = 8,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    json_file: options.Json = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Answers a prompt: the text goes to stdout, what it cost to stderr.

    [bold]Example:[/bold] deltakv generate "Sum this up." --file report.txt --method delta:budget=512

    With --jsonl, one JSON object a prompt goes to stdout.
    """
    chosen = options.parse_method(method, model)
    options.check_output(json_file)
    if jsonl is not None and (prompt is not None or file is not None):
        raise InputError("--jsonl brings its own prompts; leave the argument and --file out")
    if jsonl is not None:
        wanted, broken = prompts.read_jsonl(jsonl)
    else:
        wanted, broken = [prompts.read_one(prompt, file)], []
    for message in broken:
        options.say(f"deltakv: {message}")
    if not wanted:
        raise typer.Exit(2)

    config = check_methods(model, [chosen])
    loaded = options.load(model, dtype, device, threads)
    from deltakv.bench.provenance import provenance
    from deltakv.evals.generation import Sampling, generate_batch

    limited = [(p, _encode(loaded, p, chat, system, jsonl)) for p in wanted]
    ready = [(p, ids) for p, ids in limited if ids is not None]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    results: list[dict[str, Any]] = []
    runs: list[Generation] = []
    with options.progress() as bars:
        bar = bars.add_task("prompts", total=len(ready), visible=jsonl is not None)
        # Prompts of like length side by side: less padding to prefill, and rows end together.
        ready.sort(key=lambda pair: len(pair[1]))
        for start in range(0, len(ready), batch):
            group = ready[start : start + batch]
            stream = sys.stdout if jsonl is None else None
            run = generate_batch(loaded.model, loaded.tokenizer, chosen, [ids for _, ids in group], sampling, stream)
            runs.append(run)
            results += [
                {"id": p.id, "line": p.line, "text": row.text, "prompt_tokens": row.prompt_tokens,
                 "new_tokens": row.new_tokens, "finished": row.finished}
                for (p, _), row in zip(group, run.rows, strict=True)
            ]  # fmt: skip
            bars.advance(bar, len(group))
    results.sort(key=lambda r: r["line"] or 0)
    if jsonl is not None:
        for result in results:
            print(json.dumps({key: result[key] for key in ("id", "text", "new_tokens")}, ensure_ascii=False))
    else:
        print()
    hint(config, model, [chosen])
    for run in runs:
        options.say(run.summary())
    options.write_json(
        json_file,
        {
            **provenance(loaded.model),
            "model": loaded.name,
            "method": method,
            "results": results,
            "runs": [run.numbers() for run in runs],
        },
    )
    if broken or len(ready) < len(wanted):
        raise typer.Exit(2)


def _encode(
    loaded: options.Loaded, prompt: prompts.Prompt, chat: bool, system: str | None, jsonl: Path | None
) -> list[int] | None:
    """The prompt's ids; one over the model's limit is refused, or in a JSONL named and left out (None)."""
    from deltakv.loading import check_length

    ids = prompts.encode(loaded.tokenizer, prompt.text, chat, system)
    try:
        # One more: there has to be room for an answer.
        check_length(len(ids) + 1, loaded.model.config, "the prompt and one new token")
    except DeltaKVError as error:
        if jsonl is None:
            raise
        options.say(f"deltakv: {jsonl}, line {prompt.line}: {error}")
        return None
    return ids
