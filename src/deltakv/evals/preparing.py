"""From what a user asks for to questions: data and examples read or made, and cut to size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltakv.errors import InputError
from deltakv.evals import data, ruler, texts
from deltakv.evals.tasks import MADE, Doc, Task, find_task

if TYPE_CHECKING:
    from deltakv.evals.harness import Prompting

#: Questions of a task that makes its own, if no limit is given.
MADE_BY_DEFAULT = 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what is asked, and how answers are chosen.

    data, examples: a JSONL file or a Hub name; None for the task's own. shots: worked examples before each question;
    shot_tokens: or as many as fit into that many tokens. limit: at most that many questions. context: tokens of a
    question that is made, text included; positions: of them, the last, that perplexity is of. chat: through the
    model's chat template; None: if there is one and no examples. max_new_tokens: None for the task's own.
    batch: questions that are answered together. temperature 0 is greedy.
    """

    task: str
    data: str | None = None
    examples: str | None = None
    text: str | None = None
    shots: int = 0
    shot_tokens: int | None = None
    limit: int | None = None
    context: int = 4096
    positions: int = 512
    chat: bool | None = None
    max_new_tokens: int | None = None
    batch: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises `InputError` for what does not hold together, before anything is read."""
        task = find_task(self.task)
        if task.name in MADE:
            for option, value in (("data", self.data), ("examples", self.examples), ("shot-tokens", self.shot_tokens)):
                if value is not None:
                    raise InputError(
                        f"the task {task.name} makes its questions from a text (--text) and has no --{option}"
                    )
            if self.shots:
                raise InputError(f"the task {task.name} has no worked examples; leave --shots out")
        elif self.text is not None:
            raise InputError(f"the task {task.name} reads --data; --text is for {', '.join(MADE)}")
        if self.shots and self.shot_tokens is not None:
            raise InputError("give either --shots or --shot-tokens, not both")
        if task.name == "perplexity" and self.positions > self.context - 2:
            raise InputError(f"--positions {self.positions} must be less than --context {self.context} by 2 at least")


@dataclass(frozen=True)
class Prepared:
    """Questions with their answers, ready for the harness. facts: what the result says of the data."""

    task: Task
    docs: list[Doc]
    prompting: Prompting
    facts: dict[str, Any]


def prepare(settings: Settings, tokenizer: Any, read_text: Callable[[str], str]) -> Prepared:
    """read_text: gives the text of a file. Raises `InputError`, and `ModuleNotFoundError` without the harness."""
    from deltakv.evals.harness import Prompting

    settings.check()
    task = find_task(settings.task)
    if task.name in MADE:
        examples: list[Doc] = []
        docs = _made(task, settings, tokenizer, read_text)
        source, known = settings.text or texts.BUILTIN_NAME, data.fingerprint([doc.row() for doc in docs])
    else:
        docs, examples, source, known = _read(task, settings, tokenizer)
    template = _template(settings, tokenizer, bool(examples)) if task.name != "perplexity" else None
    prompting = Prompting(examples, template, settings.max_new_tokens or task.max_new_tokens)
    facts = {"data": source, "fingerprint": known, "examples": len(examples), "chat": template is not None}
    return Prepared(task, docs, prompting, facts)


def _read(task: Task, settings: Settings, tokenizer: Any) -> tuple[list[Doc], list[Doc], str, str]:
    """Without a set of examples of their own, these are the first rows of the data, which are then not asked."""
    assert task.hub is not None
    source = settings.data or task.hub.name
    rows = data.load_rows(source, task.hub)
    docs = task.docs(rows, source)
    examples: list[Doc] = []
    if settings.shots or settings.shot_tokens is not None:
        apart = settings.examples or (task.examples.name if task.examples and settings.data is None else None)
        pool = task.docs(data.load_rows(apart, task.examples), apart) if apart else docs
        examples = _examples(task, pool, settings, tokenizer)
        if not apart:
            docs = docs[len(examples) :]
        if not docs:
            raise InputError(f"all {len(pool)} rows of {source} serve as examples; give others with --examples")
    docs = docs[: settings.limit]
    return docs, examples, source, data.fingerprint([doc.row() for doc in [*docs, *examples]])


def _examples(task: Task, pool: list[Doc], settings: Settings, tokenizer: Any) -> list[Doc]:
    """The first ones of the pool: the same for all questions, so that their prompts begin alike."""
    if settings.shot_tokens is None:
        if settings.shots > len(pool):
            raise InputError(f"--shots {settings.shots}, but there are {len(pool)} examples; give more with --examples")
        return pool[: settings.shots]
    room, chosen = settings.shot_tokens, []
    for doc in pool:
        room -= len(tokenizer(task.example(doc))["input_ids"])
        if room < 0:
            break
        chosen.append(doc)
    if room >= 0:
        raise InputError(
            f"--shot-tokens {settings.shot_tokens}: all {len(pool)} examples are {settings.shot_tokens - room} tokens; "
            "give more with --examples"
        )
    if not chosen:
        raise InputError(f"--shot-tokens {settings.shot_tokens} are less than the first example has")
    return chosen


def _made(task: Task, settings: Settings, tokenizer: Any, read_text: Callable[[str], str]) -> list[Doc]:
    text = read_text(settings.text) if settings.text is not None else texts.builtin_text()
    count = settings.limit or MADE_BY_DEFAULT
    if task.name == "perplexity":
        return _windows(settings, tokenizer, text, count)

    def tokenize(piece: str) -> int:
        return len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    return ruler.make_docs(task.name, count, settings.context, text, tokenize, settings.seed)


def _windows(settings: Settings, tokenizer: Any, text: str, count: int) -> list[Doc]:
    """Pieces of the text that do not overlap, each `context` tokens; what is asked are the last `positions` of each."""
    size, tail = settings.context, settings.positions
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < size:
        raise InputError(
            f"the text has {len(ids):,} tokens, fewer than --context {size}; give a longer one with --text"
        )
    pieces = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][:count]
    return [Doc(tokenizer.decode(piece[: size - tail]), "", tokenizer.decode(piece[size - tail :])) for piece in pieces]


def _template(settings: Settings, tokenizer: Any, has_examples: bool) -> Callable[[list[dict[str, str]]], str] | None:
    if settings.chat and not tokenizer.chat_template:
        raise InputError("--chat, but the model has no chat template; leave it out")
    wanted = bool(tokenizer.chat_template) and not has_examples if settings.chat is None else settings.chat
    if not wanted:
        return None

    def fill(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    return fill
