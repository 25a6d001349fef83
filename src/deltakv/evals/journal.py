"""Answers on disk: a line a batch, in the file for good before the next batch begins.

A process that is killed leaves at most one line that is torn; the next one cuts it off, and answers that batch again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltakv.errors import InputError


@dataclass(frozen=True)
class Answer:
    """id: of the question. prompt_tokens, new_tokens: read, and made. finished: it came to its own end.

    For a text whose probability was asked for, `log_likelihood` of its `new_tokens` tokens in nats, and no text.
    """

    id: int
    prompt_tokens: int
    new_tokens: int
    text: str = ""
    finished: bool = True
    log_likelihood: float | None = None


@dataclass(frozen=True)
class Answered:
    """One batch. row_steps: decode steps, each row for itself; attended_tokens and full_tokens: summed over them and
    over layers. seconds: for all of it, prompts included. kv_bytes: K and V at its end, as they lie in memory:
    rows share the pages of what they have in common, but in a cache that compiles, so not all methods' are alike."""

    batch: int
    answers: list[Answer]
    row_steps: int
    attended_tokens: int
    full_tokens: int
    seconds: float
    kv_bytes: int = 0


@dataclass
class Journal:
    """The answers of one method. header: what they were made by and for; a file with another one is refused. notes:
    what else the file's first line says, for a file that begins now; afterwards, what it says there. begins: whether a
    file without a first line is given one; else it has no answers, and waits for who knows the whole header.

    Opening reads what is there, and cuts a torn last line off. Raises `InputError` for one that is damaged elsewhere.
    """

    path: Path
    header: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    batches: dict[int, Answered] = field(default_factory=dict)
    begins: bool = True

    def __post_init__(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        if not whole and not self.begins:
            return
        if not whole:
            self._append({**self.header, "notes": self.notes})
            _sync_folder(self.path.parent)
            return
        lines = whole.decode("utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                said = json.loads(line)
                if not isinstance(said, dict):
                    raise ValueError("no object")
                if number == 1:
                    self._check(said)
                    self.notes = said["notes"]
                else:
                    done = Answered(**{**said, "answers": [Answer(**answer) for answer in said["answers"]]})
                    self.batches[done.batch] = done
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{self.path}, line {number}: damaged; take the line out, or begin anew") from None

    def add(self, done: Answered) -> None:
        """Comes back when the batch is on the disk."""
        self._append(asdict(done))
        self.batches[done.batch] = done

    @property
    def answers(self) -> dict[int, Answer]:
        """By the id of their question."""
        return {answer.id: answer for done in self.batches.values() for answer in done.answers}

    def _check(self, said: dict[str, Any]) -> None:
        for name, ours in self.header.items():
            if said.get(name) != ours:
                raise InputError(
                    f"{self.path} holds answers with {name} {said.get(name)!r}, and this run has {ours!r}; "
                    "give another --out"
                )

    def _append(self, said: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(said, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def method_in(path: Path) -> str | None:
    """Whose answers a journal holds, or None if it was killed over its first line. Raises `InputError`."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            line = file.readline()
        return str(json.loads(line)["method"]) if line.endswith("\n") else None
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path}, line 1: damaged, or no answers of a run; take the file away") from None


def file_name(method: str) -> str:
    """A method as the name of a file: `delta:budget=512` is `delta-budget-512`; a long one ends in its hash."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", method).strip("-.")
    return name if len(name) <= 80 else f"{name[:64]}-{hashlib.sha256(method.encode()).hexdigest()[:12]}"


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing: a reader, and a run after a crash, never see half a file."""
    part = _part(path)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync_folder(path.parent)


def remove_whole(path: Path) -> None:
    """What `write_whole` has written, and what it left where it was killed."""
    for old in (path, _part(path)):
        old.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
