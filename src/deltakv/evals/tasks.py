"""The tasks by name: what a row of their data asks, how a worked example reads, how answers are graded."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltakv.errors import InputError
from deltakv.evals.data import HubSet, Row

#: What an answer is graded by (`grading`): mathematics, a letter, all of some words, or a text's probability.
MATH, LETTER, WORDS, TEXT = "math", "letter", "words", "text"


@dataclass(frozen=True)
class Doc:
    """A question as the harness sees it. gold: the right answer. worked: how an example says it. lead: how the answer
    to it begins already, in a prompt of plain text."""

    question: str
    gold: str
    worked: str
    lead: str = ""

    def row(self) -> Row:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Task:
    """read: from row and number to a `Doc`; raises `KeyError` for a field that is missing.

    before, after: around the question in a plain prompt, as the worked examples have it. instruction: ends the question
    where there is no example to follow. until: where an answer ends, beside the model's own end.
    """

    name: str
    says: str
    grade: str
    read: Callable[[Row, int], Doc] | None = None
    hub: HubSet | None = None
    examples: HubSet | None = None
    before: str = "Question: "
    after: str = "\nAnswer:"
    instruction: str = ""
    until: tuple[str, ...] = ("Question:",)
    max_new_tokens: int = 512

    def example(self, doc: Doc) -> str:
        """A worked example, as a plain prompt has it before a question."""
        return f"{self.before}{doc.question}{self.after} {doc.worked}\n\n"

    def docs(self, rows: Sequence[Row], source: str) -> list[Doc]:
        """Raises `InputError` that names the row and the field it lacks."""
        assert self.read is not None
        docs = []
        for number, row in enumerate(rows):
            try:
                docs.append(self.read(row, number))
            except KeyError as error:
                raise InputError(
                    f"{source}, question {number + 1}: no field {error} for the task {self.name}; it has "
                    f"{', '.join(sorted(map(str, row)))}"
                ) from None
        return docs


def _field(row: Row, *names: str) -> str:
    """The first of these fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return str(row[name]).strip()
    raise KeyError(names[0])


def _gsm8k(row: Row, number: int) -> Doc:
    worked = _field(row, "answer")
    if "####" not in worked:
        raise KeyError("answer with ####")
    gold = worked.rpartition("####")[2].strip().replace(",", "")
    if not gold:
        raise KeyError("answer with something behind ####")
    return Doc(_field(row, "question"), gold, worked)


def _math(row: Row, number: int) -> Doc:
    answer = _field(row, "answer", "Answer")
    worked = row.get("solution") or row.get("Solution") or f"The answer is $\\boxed{{{answer}}}$."
    return Doc(_field(row, "problem", "Problem", "question"), answer, str(worked).strip())


def _gpqa(row: Row, number: int) -> Doc:
    """The right answer's place among the four is drawn by the question's number: the same for every method and run."""
    right = _field(row, "Correct Answer")
    choices = [right, *(_field(row, f"Incorrect Answer {index}") for index in (1, 2, 3))]
    order = random.Random(number).sample(range(4), 4)
    letter = "ABCD"[order.index(0)]
    listed = "\n".join(f"({name}) {choices[index]}" for name, index in zip("ABCD", order, strict=True))
    return Doc(f"{_field(row, 'Question')}\n{listed}", letter, f"The answer is ({letter}).")


_BOXED = "\nReason step by step, and put the final answer within \\boxed{}."
_PROBLEM: dict[str, Any] = {
    "read": _math,
    "grade": MATH,
    "before": "Problem: ",
    "after": "\nSolution:",
    "instruction": _BOXED,
    "until": ("Problem:",),
}

_HIDDEN: dict[str, Any] = {"grade": WORDS, "before": "", "after": "\nAnswer:", "until": ("\n\n",)}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            says="grade-school mathematics",
            read=_gsm8k,
            grade=MATH,
            hub=HubSet("openai/gsm8k", "main"),
            examples=HubSet("openai/gsm8k", "main", "train"),
            instruction="\nReason step by step, and end with #### and the number.",
        ),
        Task(
            name="math500", says="competition mathematics", hub=HubSet("HuggingFaceH4/MATH-500"), max_new_tokens=4096,
            **_PROBLEM,
        ),
        Task(
            name="aime24", says="AIME 2024", hub=HubSet("HuggingFaceH4/aime_2024", None, "train"),
            max_new_tokens=32768, **_PROBLEM,
        ),
        Task(
            name="aime25", says="AIME 2025", hub=HubSet("math-ai/aime25"), max_new_tokens=32768, **_PROBLEM,
        ),
        Task(
            name="gpqa", says="GPQA-Diamond, four choices", read=_gpqa, grade=LETTER,
            hub=HubSet("Idavidrein/gpqa", "gpqa_diamond", "train"), max_new_tokens=8192,
            instruction="\nReason step by step, and end with: The answer is (letter).",
        ),
        Task(name="needle", says="a number hidden in a long text (RULER)", max_new_tokens=32, **_HIDDEN),
        Task(name="tracking", says="a chain of variables in a long text (RULER)", max_new_tokens=48, **_HIDDEN),
        Task(name="perplexity", says="of a long text's last tokens", grade=TEXT, max_new_tokens=0),
    )
}  # fmt: skip

#: Tasks whose questions are made from a text, at a length in tokens.
MADE = ("needle", "tracking", "perplexity")


def find_task(name: str) -> Task:
    """Raises `InputError` that lists the names."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; allowed are {', '.join(TASKS)}")
    return TASKS[name]


def stated_answer(text: str) -> str:
    """What follows `####` in an answer of GSM8K's form, up to the end of its line; all of any other."""
    found = re.search(r"####([^\n]*)", text)
    return found.group(1).strip() if found else text
