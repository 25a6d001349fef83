"""Small differences in vLLM: engines that are up at once, each in a process of its own, and asked in turns.

    PYTHONPATH=src:/tmp/site python3 benchmarks/vllm_beside.py --output FOLDER [--setups 1.5b 7b | two-gpus]

`1.5b`, `7b`: where the host counts, for it launches a short prompt's kernels hardly faster than a GPU runs them: time
to the first token, and steps over short contexts, by stock vLLM, deltakv's full attention and DELTA. `two-gpus`: steps
at 7B dimensions with picks by the heads of both GPUs, and with local ones. A machine is fast one minute and slow the
next, and not alike for two processes; so differences are taken turn by turn, and told with their quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_engines import (
    DIMS,
    ENVIRONMENT,
    LONG,
    SHORT,
    advertise,
    generate,
    prompts_of,
    provenance,
    save_config,
    start,
    switched_off,
)

#: Rows that decode together, and how often.
ROWS, TURNS = 64, 7


@dataclass(frozen=True)
class Setup:
    """contenders: the others are held against the first. context: of the rows that decode. kv_gib: KV cache of each
    engine and GPU, with room for them. prompts: tokens of one, and how many, for the time to the first token. engine:
    further arguments for vLLM."""

    dims: str
    contenders: tuple[str, ...]
    context: int
    kv_gib: float
    prompts: tuple[tuple[int, int], ...] = ((1000, 60), (16000, 12))
    longest: int = 16064
    gpus: int = 1
    engine: dict[str, Any] = field(default_factory=dict)


ALL = ("stock", "full", "delta")
# fmt: off
SETUPS = {
    "1.5b": Setup("1.5b", ALL, 1000, 3),
    "7b": Setup("7b", ALL, 1000, 6),
    # Two caches of a million tokens fill cards of 80 GB: no graphs but the one that is timed, prompts in small pieces.
    "two-gpus": Setup(
        "7b", ("local", "delta"), 16000, kv_gib=28.3, prompts=(), longest=32768, gpus=2,
        engine={"max_num_batched_tokens": 4096, "compilation_config": {"cudagraph_capture_sizes": [ROWS]}},
    ),
}
# fmt: on


def child(setup: Setup, name: str, folder: Path) -> None:
    """An engine that answers lines with seconds: [rows, length, seed, new tokens]; of more than one new token those of
    a step. rows 0 is one row, and its log tells the functions of the host that took longest."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log
    # A cache of a given size is not planned from what others have left of the GPU's memory.
    memory: dict[str, Any] = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": int(setup.kv_gib * 2**30)}
    memory |= setup.engine
    llm, _ = start(setup.dims, folder, name, setup.longest, tensor_parallel_size=setup.gpus, **memory)
    vocabulary = min(150000, DIMS[setup.dims][5])
    generate(llm, prompts_of(64, 200, 9, vocabulary), 4)  # whatever is compiled at first use
    ends = stamped(llm.llm_engine)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        rows, length, seed, tokens = json.loads(line)
        prompts = prompts_of(rows or 1, length, seed, vocabulary)
        with cProfile.Profile() if not rows else contextlib.nullcontext() as profile:
            seconds = generate(llm, prompts, tokens)[0]
        if tokens > 1:
            seconds = pace(ends[SHORT - tokens :])
        ends.clear()
        if profile is not None:
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
        print(seconds, file=answers, flush=True)


def stamped(engine: Any) -> list[float]:
    """When each of the engine's steps ended, in seconds: to be read, and cleared."""
    ends: list[float] = []
    step = engine.step

    def timed() -> Any:
        outputs = step()
        ends.append(time.perf_counter())
        return outputs

    engine.step = timed
    return ends


def pace(ends: list[float]) -> float:
    """Seconds a step: the mean of the middle half. Now and then the host is late, which is nobody's step."""
    taken = sorted(after - before for before, after in pairwise(ends))
    middle = taken[len(taken) // 4 : -(len(taken) // 4)]
    return sum(middle) / len(middle)


def quartiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [round(ordered[int(share * (len(ordered) - 1))], 3) for share in (0.25, 0.5, 0.75)]


class Engines:
    """One setup's engines, all up, until they are closed."""

    def __init__(self, output: Path, which: str, environment: dict[str, str], folder: Path) -> None:
        self.setup = SETUPS[which]
        self.processes = {}
        for name in self.setup.contenders:
            command = [sys.executable, __file__, "--output", str(output), "--child", which, name, str(folder)]
            with (output / f"beside-{which}-{name}.log").open("w") as log:
                self.processes[name] = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    start_new_session=True,
                )  # fmt: skip

    def ready(self) -> None:
        for name, process in self.processes.items():
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{name} did not start; see its log")

    def ask(self, name: str, rows: int, length: int, seed: int, tokens: int = 1) -> float:
        """Milliseconds."""
        process = self.processes[name]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([rows, length, seed, tokens]) + "\n")
        process.stdin.flush()
        return 1e3 * float(process.stdout.readline())

    def measured(self) -> Iterator[dict[str, Any]]:
        for length, count in self.setup.prompts:
            one = partial(self._first_token, length)
            yield {"what": "ttft", "rows": 1, "context": length, **self._in_turns(one, count)}
        yield {"what": "step", "rows": ROWS, "context": self.setup.context, **self._in_turns(self._step, TURNS)}

    def _first_token(self, length: int, name: str, turn: int) -> float:
        return self.ask(name, 1, length, seed=100 + turn)

    def _step(self, name: str, turn: int) -> float:
        """Of rows whose prompts are cached, but in the first turn; the last of `LONG` tokens, when all are there."""
        return self.ask(name, ROWS, self.setup.context, 7, LONG)

    def _in_turns(self, take: Callable[[str, int], float], count: int) -> dict[str, Any]:
        """Quartiles of milliseconds by contender, and of how much more than the first one's in the same turn, as a
        share. The first turn is not counted."""
        first, *others = self.setup.contenders
        runs: dict[str, list[float]] = {name: [] for name in self.setup.contenders}
        for turn in range(count + 1):
            for name in self.setup.contenders[:: 1 if turn % 2 else -1]:
                took = take(name, turn)
                runs[name] += [took] if turn else []
        more = {name: quartiles([a / b - 1 for a, b in zip(runs[name], runs[first], strict=True)]) for name in others}
        return {"ms": {name: quartiles(taken) for name, taken in runs.items()}, "more": more}

    def close(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder, for vllm-beside.json and the logs")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=["1.5b", "7b"])
    parser.add_argument("--profile", action="store_true", help="the host's functions by time, in the logs")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        which, name, folder = asked.child
        child(SETUPS[which], name, Path(folder))
        return 0
    asked.output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    advertise(work)
    environment = switched_off({**ENVIRONMENT, **os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    environment["PYTHONPATH"] = os.pathsep.join([str(work), *filter(None, [os.environ.get("PYTHONPATH")])])
    report: dict[str, Any] = {**provenance(), "bench": "vllm-beside", "results": []}
    for which in asked.setups:
        save_config(work / which, SETUPS[which].dims)
        with contextlib.closing(Engines(asked.output, which, environment, work / which)) as up:
            up.ready()
            for measured in up.measured():
                found = {"setup": which, "model": f"qwen2-{up.setup.dims}", "gpus": up.setup.gpus, **measured}
                print(json.dumps(found), flush=True)
                report["results"].append(found)
                (asked.output / "vllm-beside.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            for name in up.setup.contenders if asked.profile else ():
                up.ask(name, 0, 1000, seed=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
