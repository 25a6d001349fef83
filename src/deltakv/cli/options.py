"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltakv.errors import ConfigError, InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from deltakv.config import Method

Model = Annotated[
    str, typer.Option("--model", "-m", help="A folder, a Hub name (owner/name), a GGUF file, or smollm2.")
]
METHOD_HELP = (
    "delta, full, quest, streaming, tidal, lessismore, tactic, tokenselect, refreshkv, h2o, a2sf, "
    "lazyeviction or indexcache; options follow, as in "
    "delta:budget=512 (also recent, sinks, page_size, min_context, plan: a letter a layer, F full, S "
    "select, R reuse, W sinks and recent; the README has the others)."
)
OneMethod = Annotated[str, typer.Option("--method", help=METHOD_HELP)]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="A text file (default: Python's own language reference, built in)."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this JSON file too.")]
Dtype = Annotated[str, typer.Option(help="auto (fp32 on CPU), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's choice).")]

DEFAULT_MODEL = "smollm2"
DEFAULT_METHOD = "delta"


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and where they came from."""

    name: str
    path: str
    model: Any
    tokenizer: Any


def parse_method(text: str, model: str, baselines: Sequence[str] = ()) -> Method:
    """The method of `--method` for `--model`, whose config is read if the plan is "measured". Raises `ConfigError` that
    names the allowed ones, `baselines` too."""
    from deltakv.methods import REGISTRY, parse

    name = text.partition(":")[0].strip()
    if name in baselines:
        raise ConfigError(f"the baseline {name!r} takes no options; write --method {name}")
    if name not in REGISTRY:
        raise ConfigError(f"unknown method {name!r}; allowed are {', '.join([*sorted(REGISTRY), *baselines])}")
    return parse(text, lambda: _kind_of(model))


def _kind_of(model: str) -> str:
    from deltakv.bench.dims import find_config
    from deltakv.plan import model_fingerprint

    return model_fingerprint(find_config(model))


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between, each at least 1. Raises `InputError` that names the option."""
    try:
        found = [int(piece.replace("_", "")) for piece in text.split(",") if piece.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"{option} {text!r} is not a list of whole numbers such as 4000,8000")
    return found


def load(model: str, dtype: str, device: str, threads: int | None) -> Loaded:
    """Loads the model with a line on stderr, for it takes seconds. Raises `DeltaKVError` subclasses."""
    import torch

    from deltakv import loading

    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    path = loading.locate(model)
    with status(f"loading {model}"):
        tokenizer = loading.load_tokenizer(path)
        return Loaded(model, path, loading.load_model(path, dtype, device), tokenizer)


def check_output(*paths: Path | None) -> None:
    """Raises `InputError` if a file cannot be written, or two are the same, before the work that fills them."""
    given = [path for path in paths if path is not None]
    for path in given:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(
                f"cannot write {path}: {'it is a folder' if path.is_dir() else 'its folder does not exist'}"
            )
        existed = path.exists()
        try:
            path.open("a").close()
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        if not existed:
            path.unlink()
    if twice := {path for path in given if sum(path.resolve() == other.resolve() for other in given) > 1}:
        raise InputError(f"{min(twice)} cannot be both the JSON and the picture; give them different names")


def check_picture(path: Path | None, kinds: Sequence[str]) -> None:
    """Raises `InputError` if a picture's name does not end in one of `kinds`."""
    if path is not None and path.suffix.lower() not in kinds:
        raise InputError(f"cannot draw {path}: a picture's name ends in {', '.join(kinds)}")


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Writes `data` to `path`, if one is given."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say(message: str) -> None:
    """A line for the user on stderr: stdout is for results."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner on stderr while short work runs; nothing when stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(message):
        yield


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr, gone when the work is done; nothing when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars
