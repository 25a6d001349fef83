"""Where lm-evaluation-harness comes in: it makes prompts out of questions and examples, and keeps the scores.

The prompts can be answered anywhere and at any time, by a machine that does not have the harness too: what it gets as a
model looks the answers up.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from deltakv.evals.grading import grade
from deltakv.evals.questions import Question
from deltakv.evals.tasks import TEXT, Doc, Task


@dataclass(frozen=True)
class Prompting:
    """How questions become prompts. examples: worked ones that come first, the same for all. chat_template: from
    messages to text, or None for plain text. max_new_tokens: at most that many an answer."""

    examples: Sequence[Doc] = ()
    chat_template: Callable[[list[dict[str, str]]], str] | None = None
    max_new_tokens: int = 512


def make_questions(task: Task, docs: Sequence[Doc], prompting: Prompting) -> list[Question]:
    """The prompts, one a doc, numbered in order."""
    ours = _harness_task(task, docs, prompting)
    with _quiet():
        ours.build_all_requests(
            apply_chat_template=prompting.chat_template is not None,
            fewshot_as_multiturn=True,
            chat_template=_Answers((), prompting.chat_template).apply_chat_template,
        )
    questions = []
    for request in ours.instances:
        prompt, options = request.args
        if task.grade == TEXT:
            questions.append(Question(request.doc_id, prompt, continuation=options))
        else:
            questions.append(Question(request.doc_id, prompt, tuple(options["until"]), options["max_gen_toks"]))
    return questions


def score(task: Task, docs: Sequence[Doc], prompting: Prompting, answers: Sequence[Any]) -> list[float]:
    """The score of each answer, in the order of `docs`; of a text its negative log-likelihood, in nats.

    answers: text, or for `perplexity` the log-likelihood of the continuation.
    """
    ours = _harness_task(task, docs, prompting)
    with _quiet():
        result = evaluate(
            _Answers(answers, prompting.chat_template),
            {task.name: ours},
            bootstrap_iters=0,
            apply_chat_template=prompting.chat_template is not None,
            fewshot_as_multiturn=True,
        )
    samples = sorted(result["samples"][task.name], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(docs)
    return [float(sample["score"]) for sample in samples]


def _harness_task(task: Task, docs: Sequence[Doc], prompting: Prompting) -> Any:
    from datasets import Dataset

    plain = prompting.chat_template is None
    zero_shot = task.instruction if not prompting.examples else ""

    def ask(row: dict[str, str], instruction: str = zero_shot) -> str:
        before, after = (task.before, task.after) if plain and task.grade != TEXT else ("", "")
        return f"{before}{row['question']}{instruction}{after}{row['lead'] if plain else ''}"

    def judge(row: dict[str, str], results: Sequence[Any]) -> dict[str, float]:
        if task.grade == TEXT:
            return {"score": -results[0][0]}
        return {"score": grade(task.grade, row["gold"], results[0])}

    data = {name: Dataset.from_list([doc.row() for doc in part]) for name, part in (
        ("test", docs), ("examples", prompting.examples)
    )}  # fmt: skip
    until = list(task.until) if plain else []
    generation = {"until": until, "do_sample": False, "max_gen_toks": prompting.max_new_tokens}
    with _quiet():
        return ConfigurableTask(
            config={
                "task": task.name,
                "custom_dataset": lambda **_: data,
                "test_split": "test",
                "output_type": "loglikelihood" if task.grade == TEXT else "generate_until",
                "doc_to_text": ask,
                "doc_to_target": lambda row: row["worked"],
                "num_fewshot": len(prompting.examples),
                "fewshot_config": {"sampler": "first_n", "samples": list(data["examples"])},
                "process_results": judge,
                "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": task.grade != TEXT}],
                **({} if task.grade == TEXT else {"generation_kwargs": generation}),
            }
        )


class _Answers(LM):
    """A model, to the harness: one whose answers are there already."""

    def __init__(self, answers: Sequence[Any], chat_template: Callable[[list[dict[str, str]]], str] | None) -> None:
        super().__init__()
        self._answers, self._chat_template = answers, chat_template

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._answers[request.doc_id] for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(self._answers[request.doc_id], False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError("no task of ours asks for it")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert self._chat_template is not None
        return self._chat_template(chat_history)

    @property
    def tokenizer_name(self) -> str:
        return ""


@contextlib.contextmanager
def _quiet() -> Any:
    """The harness talks at length: its log, and a bar for each pass over the questions."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
