"""Generated text with what it cost: speed, time to first token, attended tokens, KV memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

import deltakv
from deltakv.config import Method
from deltakv.loading import length_limit


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One prompt's answer. `finished` tells an end of its own from one by `max_new_tokens`."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finished: bool


@dataclass(frozen=True)
class Generation:
    """What one `generate` call gave and cost. Times in seconds; token counts per decode step and row."""

    rows: list[Row]
    ttft: float
    tokens_per_s: float | None
    attended_tokens: float
    full_tokens: float
    kv_bytes: int

    def numbers(self) -> dict[str, Any]:
        """The costs, for a JSON."""
        return {
            "rows": len(self.rows),
            "ttft_s": self.ttft,
            "decode_tokens_per_s": self.tokens_per_s,
            "context": max(row.prompt_tokens + row.new_tokens for row in self.rows),
            "attended_tokens": self.attended_tokens,
            "full_tokens": self.full_tokens,
            "kv_bytes": self.kv_bytes,
        }

    def summary(self) -> str:
        """The costs in one line."""
        new = sum(row.new_tokens for row in self.rows)
        context = max(row.prompt_tokens + row.new_tokens for row in self.rows)
        parts = [f"{len(self.rows)} prompts"] if len(self.rows) > 1 else []
        parts += [f"{new} tokens" + (f" at {self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else "")]
        parts += [f"first after {self.ttft:.2f} s", f"context {context:,} tokens"]
        if self.full_tokens:
            fewer = self.full_tokens / self.attended_tokens
            parts.append(
                f"attended {self.attended_tokens:,.0f} of {self.full_tokens:,.0f} tokens a step ({fewer:.2f}x fewer)"
                if fewer > 1.005
                else f"attended all {self.full_tokens:,.0f} tokens a step"
            )
        return " · ".join([*parts, f"KV {self.kv_bytes / 2**20:,.0f} MiB"])


class _Clock(BaseStreamer):
    """Notes when tokens arrive, and passes them on to a text streamer if there is one."""

    def __init__(self, text: TextStreamer | None) -> None:
        self.text = text
        self.times: list[float] = []
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._seen_prompt:
            self.times.append(time.perf_counter())
        self._seen_prompt = True
        if self.text is not None:
            self.text.put(value)

    def end(self) -> None:
        if self.text is not None:
            self.text.end()


class _Writer(TextStreamer):
    """A `TextStreamer` that writes to `stream`."""

    def __init__(self, tokenizer: Any, stream: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.stream.write(text)
        self.stream.flush()


def generate_batch(
    model: Any,
    tokenizer: Any,
    method: Method,
    prompts: list[list[int]],
    sampling: Sampling,
    stream: TextIO | None = None,
) -> Generation:
    """Answers `prompts` (token ids, none empty) as one batch, padded on the left.

    stream: where the text goes as it comes; for one prompt only.
    New tokens are cut where the longest prompt reaches the model's limit. Raises `DeltaKVError` subclasses.
    """
    longest = max(len(ids) for ids in prompts)
    limit = length_limit(model.config)
    new_tokens = min(sampling.max_new_tokens, limit - longest if limit else sampling.max_new_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ends = end_tokens(model, tokenizer)
    clock = _Clock(_Writer(tokenizer, stream) if stream is not None and len(prompts) == 1 else None)
    torch.manual_seed(sampling.seed)
    with deltakv.apply(model, method) as handle:
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            eos_token_id=ends or None,
            streamer=clock,
            return_dict_in_generate=True,
            **sampling_options(sampling),
        )
        kv_bytes = handle.cache.kv_bytes if handle.cache is not None else 0
        stats = handle.stats
    rows = []
    for prompt, sequence in zip(prompts, out.sequences[:, longest:].tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(sequence) if token in ends), len(sequence))
        text = tokenizer.decode(sequence[:length], skip_special_tokens=True)
        rows.append(Row(text, len(prompt), length, sequence[length - 1] in ends))
    steps = len(clock.times) - 1
    decoded = sum(row.new_tokens - 1 for row in rows)
    return Generation(
        rows=rows,
        ttft=clock.times[0] - start,
        tokens_per_s=decoded / (clock.times[-1] - clock.times[0]) if steps > 0 else None,
        attended_tokens=stats.attended_per_row_step,
        full_tokens=stats.full_per_row_step,
        kv_bytes=kv_bytes,
    )


def sampling_options(sampling: Sampling) -> dict[str, Any]:
    """The same for `generate`."""
    if sampling.temperature > 0:
        return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Where an answer ends: what the model's generation config says, and the tokenizer's own end of turn."""
    told = model.generation_config.eos_token_id
    ends = {*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)
