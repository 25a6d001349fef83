"""Several methods side by side on one model and one text: fidelity, decode speed, memory.

The text is prefilled once for each page size, for prefill is the same under all methods; each then continues
the same cache, which is cropped back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import deltakv
from deltakv.bench import runners
from deltakv.bench.memory import measure_memory
from deltakv.bench.speed import BLOCK, Speed, measure_speed, turns
from deltakv.config import Full, Method
from deltakv.errors import InputError
from deltakv.evals.fidelity import Fidelity, Reference, measure, reference
from deltakv.loading import check_length

#: Starts a progress bar: (what, how many) -> advance(done).
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Entry:
    """One method's numbers; what was not measured is None."""

    method: str
    context: int
    batch: int
    fidelity: Fidelity
    speed: Speed | None = None
    kv_bytes: int | None = None
    peak_memory_bytes: int | None = None

    def numbers(self) -> dict[str, Any]:
        """One object of the JSON's `results`."""
        speed, fidelity = self.speed, asdict(self.fidelity)
        counted = speed.attended_tokens if speed is not None else fidelity["attended_tokens"]
        return {
            "method": self.method,
            "context": self.context,
            "batch": self.batch,
            "decode_tokens_per_s": speed.tokens_per_s if speed else None,
            "decode_tokens_per_s_quartiles": list(speed.spread) if speed else None,
            "attended_tokens": counted,
            **{name: fidelity[name] for name in ("kl_mean", "kl_p99", "top1", "perplexity", "positions")},
            "recall_by_layer": {str(layer): share for layer, share in fidelity["recall_by_layer"].items()},
            "kv_bytes": self.kv_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """context: tokens in the cache when speed is measured. positions: how many of them, the last, fidelity is
    evaluated on. steps: timed decode steps a method; 0 leaves speed out. memory: measure peak memory."""

    context: int
    batch: int = 1
    positions: int = 512
    steps: int = 32
    memory: bool = True

    def check(self, config: Any) -> None:
        """Raises `InputError` if the model or the text's end does not allow this."""
        if self.positions >= self.context:
            raise InputError(
                f"--positions {self.positions} must be less than --context {self.context}: "
                "what comes before them is prefilled"
            )
        decoded = BLOCK + 1 if self.steps else 0
        check_length(self.context + decoded, config, f"--context {self.context} and {decoded} decoded tokens")


def _no_progress(what: str, count: int) -> Callable[[int], None]:
    return lambda done: None


@dataclass
class Comparison:
    """One run. `methods`: as written, with their parsed form; a baseline's name stands for itself.

    ids: int64 [1, context + 1].
    """

    model: Any
    methods: Sequence[tuple[str, Method | str]]
    ids: Tensor
    settings: Settings
    progress: Progress = _no_progress
    _caches: dict[int, Any] = field(default_factory=dict)

    def run(self, path: str, dtype: str, device: str) -> list[Entry]:
        """All numbers. path, dtype, device: how a fresh process loads the same model."""
        self._prefill()
        entries = self._measure_fidelity()
        self._complete()
        if self.settings.steps:
            entries = self._measure_speed(entries)
        self._caches.clear()
        if self.settings.memory:
            entries = self._measure_memory(entries, path, dtype, device)
        return entries

    @property
    def _before(self) -> int:
        return self.settings.context - self.settings.positions

    @property
    def _main_page_size(self) -> int:
        return next((m.page_size for _, m in self.methods if isinstance(m, Method)), Full().page_size)

    def _prefill(self) -> None:
        sizes = {self._main_page_size} | {m.page_size for _, m in self.methods if isinstance(m, Method)}
        advance = self.progress("prefill", self._before * len(sizes))
        for size in sizes:
            with deltakv.apply(self.model, Full(page_size=size)) as handle:
                cache = handle.new_cache(max_length=self.settings.context + BLOCK + 1)
                runners.prefill(self.model, cache, self.ids[:, : self._before], advance)
            self._caches[size] = cache

    def _measure_fidelity(self) -> list[Entry]:
        settings = self.settings
        ids = self.ids[:, self._before : settings.context]
        targets = self.ids[0, self._before + 1 :]
        main = self._caches[self._main_page_size]
        advance = self.progress("fidelity", settings.positions * (len(self.methods) + 1))
        with deltakv.apply(self.model, Full(page_size=self._main_page_size)) as handle:
            against = reference(self.model, main, ids, handle, advance)
        entries = []
        for name, method in self.methods:
            fidelity = self._fidelity_of(method, ids, targets, against, advance)
            entries.append(Entry(name, settings.context, settings.batch, fidelity))
        return entries

    def _fidelity_of(
        self,
        method: Method | str,
        ids: Tensor,
        targets: Tensor,
        against: Reference,
        advance: Callable[[int], None],
    ) -> Fidelity:
        if isinstance(method, str):
            # Both baselines compute the same; only where K and V lie differs.
            cache = runners.dynamic_cache(self.model.config, self._caches[self._main_page_size])
            return measure(self.model, cache, ids, targets, against, None, advance)
        with deltakv.apply(self.model, method) as handle:
            return measure(self.model, self._caches[method.page_size], ids, targets, against, handle, advance)

    def _complete(self) -> None:
        """Prefills the positions that fidelity was evaluated on, so that decoding starts at `context`."""
        for size, cache in self._caches.items():
            with deltakv.apply(self.model, Full(page_size=size)):
                runners.prefill(self.model, cache, self.ids[:, self._before : self.settings.context])

    def _measure_speed(self, entries: list[Entry]) -> list[Entry]:
        """Of all but methods that evict: the few steps of a turn would show them before they have dropped anything."""
        settings = self.settings
        made = self._runners()
        first = self.ids[:, -1:].expand(settings.batch, 1).contiguous().to(self.model.device)
        advance = self.progress("speed", turns(settings.steps) * len(made))
        speeds = measure_speed(self.model, made, first, settings.steps, advance)
        measured = {runner.name: (speed, runner.kv_bytes()) for speed, runner in zip(speeds, made, strict=True)}
        return [
            replace(entry, speed=measured[entry.method][0], kv_bytes=measured[entry.method][1])
            if entry.method in measured
            else entry
            for entry in entries
        ]

    def _runners(self) -> list[runners.Runner]:
        """One for each method; the stock caches are copied while ours still has one row."""
        config, batch = self.model.config, self.settings.batch
        length = self.settings.context + BLOCK + 1
        main = self._caches[self._main_page_size]
        made: dict[int, runners.Runner] = {}
        for index, (name, method) in enumerate(self.methods):
            if isinstance(method, str):
                cache = runners.dynamic_cache(config, main)
                if method == "stock-static":
                    made[index] = runners.StaticRunner(name, runners.static_cache(config, cache, batch, length))
                else:
                    runners.repeat_rows(cache, batch)
                    made[index] = runners.StockRunner(name, cache)
        for cache in self._caches.values():
            runners.repeat_rows(cache, batch)
        for index, (name, method) in enumerate(self.methods):
            if isinstance(method, Method) and not method.evicts:
                made[index] = runners.MethodRunner(name, self.model, method, self._caches[method.page_size])
        return [made[index] for index in sorted(made)]

    def _measure_memory(self, entries: list[Entry], path: str, dtype: str, device: str) -> list[Entry]:
        settings, threads = self.settings, torch.get_num_threads()
        advance = self.progress("memory, a process a method", len(entries))
        ids = self.ids[0, : settings.context].tolist()
        done = []
        for entry, (_, method) in zip(entries, self.methods, strict=True):
            evicts = isinstance(method, Method) and method.evicts
            steps = getattr(method, "lag", 0) + 1 if evicts else 4  # so that something has been dropped
            found = measure_memory(path, entry.method, ids, settings.batch, steps, dtype, device, threads)
            done.append(
                replace(
                    entry,
                    peak_memory_bytes=found["peak_memory_bytes"],
                    kv_bytes=entry.kv_bytes or found["kv_bytes"],
                )
            )
            advance(1)
        return done
