"""What the tests of the vLLM plugin share: engines in a process of their own, and what is asked of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: How vLLM runs on a small CPU: in this very process, on one thread, with little KV cache, without the Hub.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 16,
    "max_model_len": 2048,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_logprobs": -1,
    "attention_backend": "CUSTOM",
}

#: A DELTA that leaves most of a few hundred tokens out.
SPARSE: dict[str, Any] = {"algorithm": "delta", "budget": 64, "recent": 16, "sinks": 16, "min_context": 64}


@dataclass(frozen=True)
class Row:
    """What a prompt got: tokens, the log-probabilities of the whole vocabulary at each, fp32 [tokens, vocabulary], and
    how many of its tokens came from the prefix cache."""

    tokens: list[int]
    logprobs: torch.Tensor
    cached: int


class EngineError(Exception):
    """What an engine refused with."""


class Driver:
    """The process; see driver.py."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )

    def run(self, model: str, *runs: dict[str, Any], settings: dict[str, Any] | None = None, **engine: Any) -> Any:
        """The rows of each run, from one engine. settings: the "deltakv" of `additional_config`.

        Raises `EngineError` with what the engine said if it did not start.
        """
        if settings is not None:
            engine["additional_config"] = {"deltakv": settings}
        answer = self._ask({"engine": {"model": model, **ENGINE, **engine}, "runs": list(runs)})
        return [
            [Row(row["tokens"], torch.tensor(row["logprobs"]), row["cached"] or 0) for row in rows]
            for rows in answer["runs"]
        ]

    def check(self, model: str, settings: Any = None, **engine: Any) -> str | None:
        """The plan that such an engine would run, without loading it; None without settings. Raises `EngineError`."""
        if settings is not None:
            engine["additional_config"] = {"deltakv": settings}
        plan: str | None = self._ask({"check": {"model": model, **ENGINE, **engine}})["plan"]
        return plan

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the process is gone"}')
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def prompt(length: int, seed: int, vocabulary: int = 128) -> list[int]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def ask(*prompts: list[int], tokens: int | Sequence[int] = 12, logprobs: bool = True) -> dict[str, Any]:
    """One run: these prompts together. tokens: how many each gets, or one number a prompt. logprobs: whether the rows
    come with them."""
    counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    return {
        "prompts": list(prompts),
        "sampling": [{"max_tokens": count, "logprobs": -1 if logprobs else None} for count in counts],
    }
