"""The questions of a run: prompts, ready to be answered by any machine, and what they come to in tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakv.errors import InputError

#: Prompts that begin alike by at least that many tokens are worth a prefix that is prefilled once.
LEAST_SHARED = 128


@dataclass(frozen=True)
class Question:
    """until: strings that end an answer. continuation: a text whose probability is asked for, in place of an answer."""

    id: int
    prompt: str
    until: tuple[str, ...] = ()
    max_new_tokens: int = 0
    continuation: str | None = None


def save_questions(path: Path, questions: Sequence[Question]) -> None:
    """One a line."""
    lines = (json.dumps(asdict(question), ensure_ascii=False) for question in questions)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def load_questions(path: Path) -> list[Question]:
    """What `save_questions` wrote. Raises `InputError` if it is damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows:
            raise ValueError("there are none")
        return [Question(**{**row, "until": tuple(row["until"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the questions in {path} cannot be read ({error}); begin in another folder") from None


def fingerprint(questions: Sequence[Question]) -> str:
    """16 hex digits of what is asked."""
    text = json.dumps([asdict(question) for question in questions], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Batch:
    """Questions that are answered together. number: its place among the batches. prompts: their token ids."""

    number: int
    questions: list[Question]
    prompts: list[list[int]]


def make_batches(questions: Sequence[Question], prompts: Sequence[list[int]], size: int) -> list[Batch]:
    """The longest first, so that memory that runs out does so at once, and rows of a batch are about as long.

    The same questions always give the same batches: what a row's answer is may depend, by rounding, on the rows beside
    it, and a run that goes on after a crash must end as one that was never interrupted.
    """
    order = sorted(range(len(questions)), key=lambda index: (-len(prompts[index]), index))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        Batch(number, [questions[index] for index in group], [prompts[index] for index in group])
        for number, group in enumerate(groups)
    ]


def shared_tokens(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, if that is worth sharing, else 0. Each keeps two of its own at least: a
    single token onto a cache would count as a decode step."""
    first, last = min(prompts), max(prompts)
    room = min(len(first), min(map(len, prompts)) - 2)
    shared = next((index for index in range(room) if first[index] != last[index]), room)
    return shared if shared >= LEAST_SHARED and len(prompts) > 1 else 0


def prompt_ids(tokenizer: Any, questions: Sequence[Question], chat: bool) -> list[list[int]]:
    """Token ids of each prompt; a chat template has put the special tokens in already."""
    return [
        tokenizer(question.prompt, add_special_tokens=not chat, verbose=False)["input_ids"] for question in questions
    ]
