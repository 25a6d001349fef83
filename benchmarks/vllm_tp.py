"""Do two GPUs answer as one? Log-probabilities of deltakv inside vLLM, with global and with local picks, and stock's.

    PYTHONPATH=src:/tmp/site python3 benchmarks/vllm_tp.py --output FOLDER [--seconds 300]

Of a tiny model; stock's difference between one GPU and two shows what rounding alone does. Contenders run side by side,
each in processes of its own, which end with it; NVLink multicast stays off. What global picks cost in time is measured
by vllm_beside.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_engines import ENVIRONMENT, advertise, provenance, save_tiny, switched_off
from vllm_gpu import answered

#: Contenders, each with its number of GPUs.
CONTENDERS = (("stock", 1), ("delta", 1), ("stock", 2), ("delta", 2), ("local", 2))


class Child:
    """One contender, in a session of its own."""

    def __init__(self, name: str, gpus: int, gpu: int, run: Run) -> None:
        self.label = f"{name}-{gpus}"
        self._result = run.work / f"{self.label}.json"
        self._log = run.asked.output / f"tp-{self.label}.log"
        environment = dict(run.environment)
        if gpus == 1 and not run.asked.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        told = json.dumps([name, {"tensor_parallel_size": gpus, **run.engine}])
        command = [sys.executable, __file__, "--output", str(run.asked.output), "--child", told]
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                [*command, str(run.model), str(self._result)],
                env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self, seconds: float) -> dict[str, Any] | None:
        """Its result; None if it failed, which is told."""
        try:
            code: Any = self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            code = f"none after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its workers, too
        self._process.wait()
        if self._result.exists():
            found: dict[str, Any] = json.loads(self._result.read_text(encoding="utf-8"))
            print(self.label, "answered", flush=True)
            return found
        print(self.label, "FAILED, exit code", code, "\n", self.last_words(), flush=True)
        return None

    def last_words(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-2500:]


class Run:
    """All contenders, and their JSON."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.end = asked, time.monotonic() + asked.seconds
        self.work = Path(tempfile.mkdtemp())
        advertise(self.work)
        # P2P is tried, and not just believed, before vLLM's own all-reduce is used. The engine's core stays in the
        # process that asks (ENVIRONMENT), so that no row begins before all are there.
        tried = {"VLLM_SKIP_P2P_CHECK": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        self.environment = switched_off({**ENVIRONMENT, **os.environ, **tried})
        paths = [str(self.work), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.engine: dict[str, Any] = {"enforce_eager": True} if asked.cpu else {}
        if asked.no_custom_all_reduce:
            self.engine["disable_custom_all_reduce"] = True
        self.model = self.work / "model"
        save_tiny(self.model)
        self.left_out: list[list[str]] = []

    def answers(self) -> dict[str, dict[str, Any]]:
        """By label."""
        children = [Child(name, gpus, at, self) for at, (name, gpus) in enumerate(CONTENDERS)]
        results = {}
        for child in children:
            if found := child.finish(self.end - time.monotonic()):
                results[child.label] = found
            else:
                self.left_out.append([child.label, child.last_words()[-800:]])
        return results

    def save(self, results: dict[str, dict[str, Any]]) -> None:
        report = {
            **provenance(), "bench": "vllm-tp", "engine": self.engine, "equal": compared(results),
            "left_out": self.left_out,
        }  # fmt: skip
        print(json.dumps(report["equal"]), flush=True)
        (self.asked.output / "vllm-tp.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def apart(one: dict[str, Any], other: dict[str, Any]) -> list[list[float]]:
    """By row and step: the largest difference of a log-probability, up to the first token that differs."""
    found = []
    for row, twin in zip(one["rows"], other["rows"], strict=True):
        same = [a == b for a, b in zip(row["tokens"], twin["tokens"], strict=True)]
        steps = same.index(False) + 1 if False in same else len(same)  # that token follows from equal ones
        pairs = zip(row["logprobs"][:steps], twin["logprobs"][:steps], strict=True)
        found.append([max(abs(a - b) for a, b in zip(left, right, strict=True)) for left, right in pairs])
    return found


def compared(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Two GPUs against one. In bfloat16 a near-tie may be picked otherwise: so medians are held against stock's."""
    table: dict[str, Any] = {}
    for name, alone in (("stock", "stock-1"), ("delta", "delta-1"), ("local", "delta-1")):
        if alone in results and f"{name}-2" in results:
            steps = apart(results[alone], results[f"{name}-2"])
            table[name] = {
                "contexts": [row["context"] for row in results[alone]["rows"]],
                "steps": [len(row) for row in steps],
                "median": [round(statistics.median(row), 6) for row in steps],
                "max": [round(max(row), 6) for row in steps],
            }
    if "stock" in table and "delta" in table:
        pairs = zip(table["delta"]["median"], table["stock"]["median"], strict=True)
        table["within_1.5x_of_stock"] = [delta <= 1.5 * stock for delta, stock in pairs]
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder, for vllm-tp.json and the logs")
    parser.add_argument("--seconds", type=float, default=300, help="for all of it")
    parser.add_argument("--no-custom-all-reduce", action="store_true", help="NCCL's all-reduce everywhere")
    parser.add_argument("--cpu", action="store_true", help="try the script itself, on vLLM's CPU build")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        told, model, result = asked.child
        name, engine = json.loads(told)
        Path(result).write_text(json.dumps(answered(Path(model), name, **engine)), encoding="utf-8")
        os._exit(0)  # at once: whoever waits ends the workers, which may take their time
    asked.output.mkdir(parents=True, exist_ok=True)
    run = Run(asked)
    run.save(run.answers())
    for what in run.left_out:
        print("left out:", *what, flush=True)
    return bool(run.left_out)


if __name__ == "__main__":
    sys.exit(main())
