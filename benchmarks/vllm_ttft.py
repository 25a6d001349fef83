"""Time to the first token in vLLM's engine, deltakv beside stock: engines side by side on one GPU, asked in turns.

    PYTHONPATH=src:/tmp/site python3 benchmarks/vllm_ttft.py --output FOLDER [--dims 1.5b 7b] [--seconds 300]

The host launches a short prompt's kernels hardly faster than a GPU runs them, and a machine's host is fast one minute
and slow the next. So all engines are up at once, each in a process of its own, and each prompt goes to all of them, one
after the other; differences are taken prompt by prompt.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_gpu import DIMS, ENVIRONMENT, advertise, generate, prompts_of, provenance, save_config, start, switched_off

CONTENDERS = ("stock", "full", "delta")
#: Tokens of a prompt, and how many prompts.
PROMPTS = ((1000, 60), (16000, 12))
#: Of the GPU's memory, each engine's share, and the bytes of its KV cache: room for a prompt, and more.
SHARES = {"tiny": 0.05, "1.5b": 0.1, "7b": 0.27}
KV_BYTES = 2 << 30


def child(dims: str, name: str, folder: Path) -> None:
    """An engine that answers lines: [length, seed] with seconds, "profile" with the functions that took longest."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log
    llm, _ = start(
        dims, folder, name, max(length for length, _ in PROMPTS) + 64,
        gpu_memory_utilization=SHARES[dims], kv_cache_memory_bytes=KV_BYTES,
    )  # fmt: skip
    vocabulary = min(150000, DIMS[dims][5])
    generate(llm, prompts_of(64, 200, 9, vocabulary), 4)  # whatever is compiled at first use
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        length, seed = json.loads(line)
        prompts = prompts_of(1, length, seed, vocabulary)
        if seed < 0:
            profile = cProfile.Profile()
            for turn in range(20):
                fresh = prompts_of(1, length, seed * 100 - turn, vocabulary)
                profile.runcall(generate, llm, fresh, 1)
            told = io.StringIO()
            pstats.Stats(profile, stream=told).sort_stats("tottime").print_stats(25)
            print(told.getvalue(), file=sys.stderr, flush=True)
        print(generate(llm, prompts, 1)[0], file=answers, flush=True)


def quartiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [round(ordered[int(share * (len(ordered) - 1))], 3) for share in (0.25, 0.5, 0.75)]


class Engines:
    """One model's engines, all up."""

    def __init__(self, asked: argparse.Namespace, dims: str, environment: dict[str, str], folder: Path) -> None:
        self.processes = {}
        for name in CONTENDERS:
            log = (asked.output / f"ttft-{dims}-{name}.log").open("w")
            command = [sys.executable, __file__, "--output", str(asked.output), "--child", dims, name, str(folder)]
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ready(self) -> None:
        for name, process in self.processes.items():
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{name} did not start; see its log")

    def ask(self, name: str, length: int, seed: int) -> float:
        process = self.processes[name]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([length, seed]) + "\n")
        process.stdin.flush()
        return 1e3 * float(process.stdout.readline())

    def measured(self, length: int, count: int) -> dict[str, Any]:
        """Milliseconds by contender, and how much more than stock's at the same prompt, as a share."""
        runs: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for seed in range(-1, count):
            order = CONTENDERS if seed % 2 else CONTENDERS[::-1]
            for name in order:
                took = self.ask(name, length, seed + 10)
                runs[name] += [took] if seed >= 0 else []
        more = {
            name: quartiles([a / b - 1 for a, b in zip(runs[name], runs["stock"], strict=True)])
            for name in CONTENDERS[1:]
        }
        return {"context": length, "ms": {name: quartiles(taken) for name, taken in runs.items()}, "more": more}

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder, for vllm-ttft.json and the logs")
    parser.add_argument("--dims", nargs="+", choices=SHARES, default=["1.5b", "7b"])
    parser.add_argument("--profile", action="store_true", help="the host's functions by time, in the logs")
    parser.add_argument("--seconds", type=float, default=300, help="for all of it")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], asked.child[1], Path(asked.child[2]))
        return 0
    end = time.monotonic() + asked.seconds
    asked.output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    advertise(work)
    environment = switched_off({**ENVIRONMENT, **os.environ})
    environment["PYTHONPATH"] = os.pathsep.join([str(work), *filter(None, [os.environ.get("PYTHONPATH")])])
    engines = {}
    for dims in asked.dims:
        save_config(work / dims, dims)
        engines[dims] = Engines(asked, dims, environment, work / dims)
    report: dict[str, Any] = {**provenance(), "bench": "vllm-ttft", "results": []}
    try:
        for dims, up in engines.items():
            up.ready()
            print(dims, f"is up, {end - time.monotonic():.0f} s left", flush=True)
        for dims, up in engines.items():
            for length, count in PROMPTS:
                found = {"model": f"qwen2-{dims}", **up.measured(length, count)}
                print(json.dumps(found), flush=True)
                report["results"].append(found)
                (asked.output / "vllm-ttft.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            for name in CONTENDERS if asked.profile else ():
                up.ask(name, PROMPTS[0][0], -1)
    finally:
        for up in engines.values():
            up.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
