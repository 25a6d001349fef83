"""A whole run in a folder: questions, the answers of each method, and what they come to.

    run.json             what was asked for
    questions.jsonl      the prompts
    answers/METHOD.jsonl a journal a method
    results.json         scores, intervals, costs

Each step takes up what is there, so a run that was killed goes on where it was, and prompts can be answered on another
machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltakv.bench.provenance import provenance
from deltakv.config import Full, Method
from deltakv.errors import InputError
from deltakv.evals import answering, questions, significance
from deltakv.evals.generation import Sampling
from deltakv.evals.journal import Journal, file_name, method_in, write_whole
from deltakv.evals.preparing import Prepared, Settings
from deltakv.evals.questions import Question
from deltakv.evals.tasks import TEXT

#: Starts a progress bar: (what, how many) -> advance(done).
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Folder:
    """A run's files."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def questions(self) -> Path:
        return self.path / "questions.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    def journal(self, method: str) -> Path:
        return self.path / "answers" / f"{file_name(method)}.jsonl"

    def methods(self) -> list[str]:
        """Those that have answered something here, as written."""
        found = (method_in(path) for path in sorted((self.path / "answers").glob("*.jsonl")))
        return [method for method in found if method is not None]

    @contextmanager
    def held(self) -> Iterator[None]:
        """For one process at a time; the kernel lets go of it when that one dies. Raises `InputError`."""
        from filelock import FileLock, Timeout

        try:
            (self.path / "answers").mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise InputError(
                f"another deltakv eval is at work in {self.path}; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise InputError(f"cannot write to the folder {self.path}: {error.strerror}") from None

    def asked(self) -> dict[str, Any] | None:
        """What `run.json` says, or None without one. Raises `InputError` if it is damaged, or the folder a file."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"cannot write to the folder {self.path}: it is a file")
        try:
            said = json.loads(self.run.read_text(encoding="utf-8"))
            Settings(**said["settings"])
            return dict(said)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.run} cannot be read ({error}); begin in another folder") from None


def check_settings(folder: Folder, settings: Settings) -> None:
    """Raises `InputError` if the folder holds a run that asks something else. Where the data lies may change."""
    said = folder.asked()
    if said is None:
        return
    before, now = said["settings"], asdict(settings)
    for name in now:
        if name not in ("data", "examples", "text") and before.get(name) != now[name]:
            raise InputError(
                f"{folder.path} holds a run with {name} {before.get(name)!r}, and this one has {now[name]!r}; "
                "give another --out"
            )


def find_questions(folder: Folder, prepared: Prepared | None, model_id: str) -> tuple[list[Question], dict[str, Any]]:
    """The run's questions, from the folder or made now, and what is known of them; nothing is written.

    prepared: None where the folder's own are to be taken as they are. Raises `InputError` if the folder holds others.
    """
    said = folder.asked()
    facts = {**(prepared.facts if prepared else {}), "model_fingerprint": model_id}
    if said is None:
        assert prepared is not None
        from deltakv.evals.harness import make_questions

        return make_questions(prepared.task, prepared.docs, prepared.prompting), facts
    for name, now in facts.items():
        if name in ("fingerprint", "chat", "model_fingerprint") and said["facts"].get(name) != now:
            what = {"fingerprint": "other data or examples", "chat": "another --chat"}.get(name, "another model")
            raise InputError(f"{folder.path} holds a run with {what}; give another --out")
    found = questions.load_questions(folder.questions)
    if "questions" in said and said["questions"] != questions.fingerprint(found):
        raise InputError(
            f"{folder.questions} is not what this run has written there; bring it back, or begin in another folder"
        )
    return found, said["facts"]


def fingerprint(config: Any) -> str:
    """16 hex digits of a model's config: tells one model from another, not one fine-tuning from another."""
    said = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"):
        said.pop(name, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """Questions and the methods that answer them, each as written, with its parsed form."""

    folder: Folder
    settings: Settings
    facts: dict[str, Any]
    asked: Sequence[Question]
    methods: Sequence[tuple[str, Method]]

    @cached_property
    def fingerprint(self) -> str:
        """Of what is asked: megabytes, where many examples stand before each question."""
        return questions.fingerprint(self.asked)

    def begin(self, model: str) -> None:
        """Writes down what is asked, unless that is there already. model: as the user named it."""
        if self.folder.run.exists():
            return
        questions.save_questions(self.folder.questions, self.asked)
        said = {"settings": asdict(self.settings), "facts": self.facts, "model": model}
        said["questions"] = self.fingerprint
        # Last, because it says that the questions are there.
        write_whole(self.folder.run, json.dumps(said, indent=2, ensure_ascii=False) + "\n")

    def journal(self, method: str, model: Any = None) -> Journal:
        """A method's answers so far. model: that goes on answering; answers by another dtype or device are refused."""
        header = {"method": method, "questions": self.fingerprint}
        if model is not None:
            header |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
        notes = provenance(model) if model is not None else {}
        return Journal(self.folder.journal(method), header, notes, begins=model is not None)

    def work(self, tokenizer: Any, config: Any) -> answering.Work:
        """Raises `InputError` if a prompt does not fit the model."""
        return answering.lay_out(self.asked, tokenizer, config, self.settings.batch, bool(self.facts["chat"]))

    def answer(
        self, model: Any, tokenizer: Any, work: answering.Work, journals: Sequence[Journal], progress: Progress
    ) -> None:
        """Answers all that is missing in the methods' journals, one a method."""
        settings = self.settings
        sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)
        for (name, method), journal in zip(self.methods, journals, strict=True):
            advance = progress(name, len(self.asked))
            answering.answer_all(model, tokenizer, method, work, journal, sampling, advance)

    def missing(self, method: str) -> int:
        """How many answers of a method are still to come. Raises `InputError` if it has answered what is not asked."""
        path, asked = self.folder.journal(method), {question.id for question in self.asked}
        answered = self.journal(method).answers.keys() if path.exists() else set[int]()
        if unknown := answered - asked:
            raise InputError(f"{path} answers question {min(unknown)}, which is not asked; take the file away")
        return len(asked - answered)

    def results(self, prepared: Prepared) -> list[dict[str, Any]]:
        """One object a method that has answered everything, those of earlier calls included; each compared with full
        attention, or with the first method where that is not there."""
        from deltakv.evals.harness import score

        entries, losses = [], {}
        names = list(dict.fromkeys([*(name for name, _ in self.methods), *self.folder.methods()]))
        names = [name for name in names if not self.missing(name)]
        base = next((name for name in names if name.partition(":")[0] == Full.algorithm), names[0])
        for name in names:
            journal = self.journal(name)
            answers = [journal.answers[question.id] for question in self.asked]
            texts = prepared.task.grade == TEXT
            replies = [answer.log_likelihood if texts else answer.text for answer in answers]
            losses[name] = score(prepared.task, prepared.docs, prepared.prompting, replies)
            entries.append(_costs(name, journal) | {"scores": losses[name]})
        for entry in entries:
            ours, theirs = losses[entry["method"]], losses[base]
            if prepared.task.grade == TEXT:
                tokens = [journal.answers[question.id].new_tokens for question in self.asked]
                entry |= significance.perplexity(ours, tokens)
                versus = significance.paired_perplexity(ours, theirs, tokens)
            else:
                entry |= significance.accuracy(ours)
                versus = significance.paired(ours, theirs)
            entry["versus"] = None if entry["method"] == base else {"method": base, **versus}
        return entries


def _costs(name: str, journal: Journal) -> dict[str, Any]:
    """Tokens are a step and row, over layers; seconds and counts are over all questions."""
    batches, answers = journal.batches.values(), journal.answers.values()
    steps = sum(done.row_steps for done in batches)
    attended, full = (sum(getattr(done, what) for done in batches) for what in ("attended_tokens", "full_tokens"))
    return {
        "method": name,
        "questions": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers) / len(answers),
        "new_tokens": sum(answer.new_tokens for answer in answers) / len(answers),
        "truncated": sum(not answer.finished for answer in answers),
        "attended_tokens": attended / steps if steps else None,
        "full_tokens": full / steps if steps else None,
        "kv_bytes": max(done.kv_bytes for done in batches),
        "seconds": round(sum(done.seconds for done in batches), 3),
        "made": journal.notes,
    }
