"""Result files of the other commands, read back: what each of them says about fidelity, answers, step times, picks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltakv.errors import InputError
from deltakv.evals.picks import PickRecord

Entry = dict[str, Any]


#: Numbers of a method in `eval`: of texts, and of answers.
TEXTS = ("questions", "perplexity", "seconds")
ANSWERS = ("questions", "accuracy", "seconds", "new_tokens", "truncated")
#: And in other results, where they are there.
MEASURED = (
    "context", "batch", "kl_mean", "kl_p99", "top1", "perplexity", "attended_tokens", "median_ms",
    "decode_tokens_per_s",
)  # fmt: skip


@dataclass
class Results:
    """Entries by what they are about; each knows its model and where it was measured (`where`).

    answers: one `eval` each. fidelity: of `compare` and `calibrate`, with `attended_tokens` and `kl_mean`. steps: of
    `bench` and `compare`, with `step_ms`. picks: of `inspect`. sources: name, model, machine, date and commit of files.
    """

    answers: list[Entry] = field(default_factory=list)
    fidelity: list[Entry] = field(default_factory=list)
    steps: list[Entry] = field(default_factory=list)
    picks: list[tuple[str, PickRecord]] = field(default_factory=list)
    sources: list[Entry] = field(default_factory=list)


def read_results(paths: Sequence[Path]) -> Results:
    """Raises `InputError` for a file that cannot be read, or holds nothing that a page could show."""
    found = Results()
    for path in paths:
        data = _load(path)
        before = _size(found)
        try:
            _sort_in(data, found)
            origins = _origins(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} looks like a result file, but is not whole ({error!r})") from None
        if _size(found) == before:
            raise InputError(f"{path} holds no results of compare, bench, eval, inspect or calibrate that can be drawn")
        found.sources += [{"file": path.name, "model": data.get("model", "")} | origin for origin in origins]
    return found


def _load(path: Path) -> Entry:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"the file {path} is not JSON") from None
    if not isinstance(data, dict):
        raise InputError(f"the file {path} is no result file: it does not hold an object")
    return data


def _sort_in(data: Entry, found: Results) -> None:
    about = {"model": str(data.get("model", "")), "where": _where(data)}
    if data.get("kind") == "eval":
        for result in data["results"]:
            texts, versus = "perplexity" in result, result["versus"]
            _ = data["task"], result["method"], result["attended_tokens"], result["full_tokens"]
            _numbers(result, "attended_tokens", "full_tokens")
            _numbers(result, *(TEXTS if texts else ANSWERS), need=True)
            _span(result)
            if versus is not None:
                _ = versus["method"], texts or versus["p"]
                _numbers(versus, "p")
                _numbers(versus, *(("ratio",) if texts else ("difference", "better", "worse")), need=True)
                _span(versus)
        if not data["results"]:
            raise ValueError("no results")
        found.answers.append(data | about)
    elif "picks" in data:
        names = [name for name in PickRecord.__dataclass_fields__ if name not in ("picks", "recall")]
        by_layer = {int(layer): pages for layer, pages in data["picks"].items()}
        recall = {int(layer): share for layer, share in data["recall_by_layer"].items()}
        record = PickRecord(**{name: data[name] for name in names}, picks=by_layer, recall=recall)
        found.picks.append((f"{about['model']} on {data.get('text', '')}", record))
    else:
        for result in [*data.get("results", []), *data.get("confirmed", [])]:
            text = data.get("text") or ", ".join(data.get("texts", ()))
            entry = {**about, "text": text, "context": data.get("context"), **result}
            _numbers(entry, *MEASURED)
            if entry.get("kl_mean") is not None and entry.get("attended_tokens"):
                _ = entry["method"]
                found.fidelity.append(entry)
            if milliseconds := _step_ms(entry):
                found.steps.append({**entry, "step_ms": milliseconds})


def _numbers(entry: Entry, *names: str, need: bool = False) -> None:
    """Raises `TypeError` for what is no number. need: for what is missing, too."""
    for name in names:
        value = entry.get(name)
        if not (isinstance(value, int | float) or (value is None and not need)):
            raise TypeError(f"{name} is {value!r}")


def _span(entry: Entry) -> None:
    low, high = entry["interval"]
    _numbers({"low": low, "high": high}, "low", "high", need=True)


def _step_ms(entry: Entry) -> float | None:
    if not entry["context"]:
        return None
    if entry.get("median_ms"):
        return float(entry["median_ms"])
    speed = entry.get("decode_tokens_per_s")
    return 1e3 * entry["batch"] / speed if speed else None


def _origins(data: Entry) -> list[Entry]:
    """Where a file's numbers are from: of answers, which may be graded elsewhere, where each method's were given."""
    made = [row["made"] for row in data["results"]] if data.get("kind") == "eval" else [data]
    origins = [{"where": _where(one)} | _origin(one) for one in made]
    return [origin for number, origin in enumerate(origins) if origin not in origins[:number]]


def _where(data: Entry) -> str:
    device, machine = str(data.get("device", "cpu")), data.get("machine") or {}
    if device.startswith("cuda") and machine.get("gpus"):
        device = str(machine["gpus"][0])
    if device in ("cpu", "CPU"):
        device = f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'a CPU')}"
    return ", ".join(filter(None, [device, str(data.get("dtype", ""))]))


def _origin(data: Entry) -> Entry:
    versions = data.get("versions") or {}
    return {
        "date": str(data.get("date", ""))[:10],
        "commit": str(data.get("commit") or "")[:9]
        + ("+changes" if str(data.get("commit")).endswith("+changes") else ""),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name)),
    }


def _size(found: Results) -> int:
    return len(found.answers) + len(found.fidelity) + len(found.steps) + len(found.picks)
