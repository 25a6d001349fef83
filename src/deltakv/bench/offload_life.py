"""Memory over a cache's life in host memory: on the device as rows grow, and on the host over many requests."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltakv
from deltakv.bench.offload_run import layer_slabs
from deltakv.bench.offload_steps import prompt
from deltakv.config import Full
from deltakv.offload.ahead import page_lock
from deltakv.offload.config import Host

#: Requests of a round: rows, tokens of their prompts, new tokens. Every round has all of them, in another order.
REQUESTS = (
    (1, 4000, 24),
    (8, 500, 16),
    (4, 1500, 16),
    (1, 60, 48),
    (16, 250, 12),
    (2, 3000, 16),
    (3, 900, 32),
    (6, 30, 24),
)


@dataclass(frozen=True)
class Flat:
    """Rows of `length` tokens. prefill_peak, decode_peak: the most device memory that a chunk of the prompt and a
    decode step took, weights aside; chunk_bytes: what of it is chunks, always. host_bytes: taken for the cache."""

    length: int
    prefill_peak: int
    decode_peak: int
    chunk_bytes: int
    host_bytes: int

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return dict(self.__dict__)


def grow(
    model: Any, host: Host, batch: int, lengths: Sequence[int], columns: int, say: Callable[[str], None]
) -> list[Flat]:
    """One cache that grows from each of `lengths`, ascending, to the next by forwards of `columns` columns, and decodes
    a few tokens at each. Only on a GPU are the peaks more than 0."""
    found = []
    weights = _allocated(model.device)
    with torch.no_grad(), deltakv.apply(model, Full(), kv_device=host) as handle:
        cache: Any = handle.new_cache(max_length=lengths[-1] + 1)
        ids, done = prompt(model.config, batch, lengths[-1]).to(model.device), 0
        weights += ids.nbytes if model.device.type == "cuda" else 0
        if model.device.type == "cuda":
            say("page-locking host memory")
            offload: Any = handle.offload
            layer = layer_slabs(offload.shape, batch, lengths[-1], 0 if offload.reason else lengths[-1])
            page_lock(model.config.num_hidden_layers * layer, say=say)
        for length in lengths:
            say(f"{length:,} tokens")
            _reset_peak(model.device)
            for chunk in ids[:, done:length].split(columns, dim=1):
                model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            prefill_peak, done = _peak(model.device) - weights, length
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)
            _reset_peak(model.device)
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            peak = _peak(model.device) - weights
            cache.crop(-1)
            rows = cache.host_rows
            found.append(Flat(length, prefill_peak, peak, rows.device_bytes, rows.host_bytes))
    return found


@dataclass(frozen=True)
class Round:
    """After a round of requests. seconds: since the first began. rss, pinned: bytes of the process in host memory, and
    what is page-locked for it, on a GPU. device: bytes that are in use there."""

    requests: int
    tokens: int
    seconds: float
    rss: int
    pinned: int
    device: int

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return dict(self.__dict__)


def live(
    model: Any, host: Host, minutes: float, requests: Sequence[tuple[int, int, int]], seed: int = 0
) -> list[Round]:
    """Rounds of `generate`, each request with left padding and a cache of its own, until that time is over; two rounds
    at least."""
    order, rounds, count, made = random.Random(seed), list[Round](), 0, 0
    model.generation_config.eos_token_id = None
    start = time.perf_counter()
    with torch.no_grad(), deltakv.apply(model, Full(), kv_device=host):
        while len(rounds) < 2 or time.perf_counter() - start < 60 * minutes:
            for rows, length, new in order.sample(list(requests), len(requests)):
                ids, mask = _padded(model, rows, length)
                model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
                count, made = count + 1, made + rows * new
            gc.collect()
            rounds.append(Round(count, made, time.perf_counter() - start, *_held(model.device)))
    return rounds


def _padded(model: Any, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows from a half of `length` tokens to all of it."""
    ids = prompt(model.config, rows, length)
    lengths = torch.linspace(max(1, length // 2), length, rows).long() if rows > 1 else torch.tensor([length])
    mask = torch.arange(length) >= length - lengths[:, None]
    return (ids * mask).to(model.device), mask.long().to(model.device)


def _held(device: torch.device) -> tuple[int, int, int]:
    rss = 0
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            rss = int(line.split()[1]) * 1024
    if device.type != "cuda":
        return rss, 0, 0
    torch.cuda.synchronize(device)
    return rss, torch.cuda.host_memory_stats()["allocated_bytes.current"], torch.cuda.memory_allocated(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
