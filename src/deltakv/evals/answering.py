"""A model under a method answers questions, batch after batch. Needs no harness."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deltakv
from deltakv.bench.runners import prefill
from deltakv.config import Method
from deltakv.errors import InputError
from deltakv.evals.fidelity import CHUNK
from deltakv.evals.generation import Sampling, end_tokens, sampling_options
from deltakv.evals.journal import Answer, Answered, Journal
from deltakv.evals.questions import Batch, Question, make_batches, prompt_ids, shared_tokens
from deltakv.integrations.hf.support import model_shape
from deltakv.loading import length_limit

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """The batches of a run, the same for each method. shared: tokens that all prompts begin with, prefilled once.
    new_tokens: at most that many an answer, so that the longest prompt stays within the model's limit."""

    batches: list[Batch]
    shared: int
    new_tokens: int

    @property
    def longest(self) -> int:
        return len(self.batches[0].prompts[0])


def lay_out(questions: Sequence[Question], tokenizer: Any, config: Any, batch: int, chat: bool) -> Work:
    """Raises `InputError` if a prompt does not fit the model."""
    prompts = prompt_ids(tokenizer, questions, chat)
    longest = max(map(len, prompts))
    scored = questions[0].continuation is not None
    wanted = max(question.max_new_tokens for question in questions)
    limit = length_limit(config)
    if limit is not None and longest + (0 if scored else 1) > limit:
        raise InputError(
            f"the longest prompt has {longest:,} tokens, but the model's limit is {limit:,}; "
            "give fewer examples, or a shorter --context"
        )
    room = wanted if limit is None else min(wanted, limit - longest)
    # Behind a shared prefix rows have padding in their midst, and a sliding window would count it.
    gaps = batch > 1 and any(model_shape(config).windows)
    shared = 0 if scored or gaps else shared_tokens(prompts)
    return Work(make_batches(questions, prompts, 1 if scored else batch), shared, room)


def answer_all(
    model: Any,
    tokenizer: Any,
    method: Method,
    work: Work,
    journal: Journal,
    sampling: Sampling,
    advance: Advance = lambda questions: None,
) -> None:
    """Answers all batches that the journal does not have yet."""
    there = journal.answers.keys()
    missing = [batch for batch in work.batches if not there >= {question.id for question in batch.questions}]
    advance(sum(len(batch.questions) for batch in work.batches) - sum(len(batch.questions) for batch in missing))
    if not missing:
        return
    with deltakv.apply(model, method) as handle, torch.no_grad():
        answerer = _Answerer(model, tokenizer, handle, work, sampling)
        for batch in missing:
            journal.add(answerer.answer(batch))
            advance(len(batch.questions))


class _Answerer:
    """What the batches of one method share: the handle, and the prefix that all prompts begin with."""

    def __init__(self, model: Any, tokenizer: Any, handle: Any, work: Work, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.handle = model, tokenizer, handle
        self.work, self.sampling = work, sampling
        self.ends = end_tokens(model, tokenizer)
        self._prefix: Any = None

    def answer(self, batch: Batch) -> Answered:
        stats = self.handle.stats
        stats.reset()
        start = time.perf_counter()
        scored = batch.questions[0].continuation is not None
        answers = [self._score(batch.questions[0])] if scored else self._generate(batch)
        counts = (stats.rows, stats.attended_tokens, stats.full_tokens)  # waits for the device
        return Answered(batch.number, answers, *counts, round(time.perf_counter() - start, 4), stats.kv_bytes)

    def _generate(self, batch: Batch) -> list[Answer]:
        shared, prompts, stops = self.work.shared, batch.prompts, list(batch.questions[0].until)
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        # What is shared comes first, and padding behind it: all rows go on from the same columns.
        lines = [(prompt[:shared], [pad] * (width - len(prompt)), prompt[shared:]) for prompt in prompts]
        device = self.model.device
        ids = torch.tensor([[*head, *gap, *tail] for head, gap, tail in lines], device=device)
        mask = torch.tensor([[1] * len(head) + [0] * len(gap) + [1] * len(tail) for head, gap, tail in lines])
        options: dict[str, Any] = {"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}
        if shared:
            options["past_key_values"] = self._go_on_from(ids[:1, :shared], len(prompts))
        # A seed for each batch: whether earlier ones were answered in this process must not show.
        torch.manual_seed(self.sampling.seed * 1_000_003 + batch.number)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask.to(device),
            max_new_tokens=self.work.new_tokens,
            pad_token_id=pad,
            eos_token_id=self.ends or None,
            **sampling_options(self.sampling),
            **options,
        )
        rows = out[:, width:].tolist()
        each = zip(batch.questions, prompts, rows, strict=True)
        return [self._read(question, prompt, row, stops) for question, prompt, row in each]

    def _read(self, question: Question, prompt: list[int], row: list[int], stops: list[str]) -> Answer:
        """One row's answer: up to the model's end token or a stop string, whichever comes first; padding is neither."""
        length = next((index + 1 for index, token in enumerate(row) if token in self.ends), len(row))
        finished = length > 0 and row[length - 1] in self.ends
        text = self._decode(row[:length])
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            low, high = 1, length  # the fewest tokens whose text holds a stop string
            while low < high:
                middle = (low + high) // 2
                held = self._decode(row[:middle])
                low, high = (low, middle) if any(stop in held for stop in stops) else (middle + 1, high)
            text, length, finished = text[: min(places)], low, True
        return Answer(question.id, len(prompt), length, text, finished)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _go_on_from(self, prefix: Tensor, rows: int) -> Any:
        """A cache of `rows` rows that hold the shared prefix, int64 [1, shared], prefilled once and then copied: exact,
        because prefill is full attention in all methods, and K and V of a token rest on those before it alone."""
        if self._prefix is None:
            on_gpu = self.model.device.type == "cuda"
            # On a GPU rows get room for all that is to come, so that a step can be captured; on a CPU they share pages.
            room = self.work.longest + self.work.new_tokens if on_gpu else None
            self._prefix = self.handle.new_cache(room, static=on_gpu)
            prefill(self.model, self._prefix, prefix)
        cache = copy.deepcopy(self._prefix)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
            if cache.is_compileable:
                cache.unshare()
        return cache

    def _score(self, question: Question) -> Answer:
        """The log-likelihood of a continuation, each token predicted as if the one before it had just been decoded."""
        assert question.continuation is not None
        before = self.tokenizer(question.prompt, verbose=False)["input_ids"]
        whole = self.tokenizer(question.prompt + question.continuation, verbose=False)["input_ids"]
        ids = torch.tensor([whole], device=self.model.device)
        start = len(before)
        cache = self.handle.new_cache(len(whole))
        prefill(self.model, cache, ids[:, : start - 1])
        total = 0.0
        with self.handle.positions():
            for first in range(start, len(whole), CHUNK):
                last = min(first + CHUNK, len(whole))
                out = self.model(ids[:, first - 1 : last - 1], past_key_values=cache, use_cache=True)
                said = out.logits[0].double().log_softmax(-1)
                total += said.gather(-1, ids[0, first:last, None]).sum().item()
        return Answer(question.id, start, len(whole) - start, log_likelihood=total)
