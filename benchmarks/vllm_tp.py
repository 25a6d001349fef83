"""deltakv inside vLLM on two GPUs: what picks by the heads of both cost over local ones, and whether two answer as one.

    PYTHONPATH=src:/tmp/site python3 benchmarks/vllm_tp.py --output FOLDER [--parts 7b equal] [--seconds 560]

`7b`: a step of pure decode, 64 rows of 16,000 tokens, by stock vLLM and by deltakv with global and with local picks.
`equal`: log-probabilities of the tiny model on two GPUs against one; stock's show what rounding alone does.
Each contender runs in processes of its own, which end with it; NVLink multicast stays off.
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

import vllm_gpu
from vllm_gpu import ENVIRONMENT, advertise, answered, provenance, save_config, save_tiny, switched_off, timed

SIZES = ((64, 16000),)
LONGEST = 32768
#: Parts: the model, and contenders, each with its number of GPUs. Where nothing is timed all run side by side.
PARTS: dict[str, tuple[str, tuple[tuple[str, int], ...]]] = {
    "7b": ("7b", (("stock", 2), ("delta", 2), ("local", 2))),
    "equal": ("tiny", (("stock", 1), ("delta", 1), ("stock", 2), ("delta", 2), ("local", 2))),
}
#: No contender takes longer; where less than a half is left none is started.
CHILD_SECONDS = 200.0


class Child:
    """One contender, in a session of its own."""

    def __init__(self, part: str, name: str, gpus: int, gpu: int, run: Run) -> None:
        self.label = f"{part}-{name}-{gpus}"
        self._result = run.work / f"{self.label}.json"
        self._log = run.asked.output / f"tp-{self.label}.log"
        environment = dict(run.environment)
        if gpus == 1 and not run.asked.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        told = json.dumps({"part": part, "name": name, "gpus": gpus, "engine": run.engine, "cpu": run.asked.cpu})
        command = [sys.executable, __file__, "--output", str(run.asked.output), "--child", told]
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                [*command, str(run.folder(PARTS[part][0])), str(self._result)],
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
            print(self.label, json.dumps(found.get("shapes", "answered")), flush=True)
            return found
        print(self.label, "FAILED, exit code", code, "\n", self.last_words(), flush=True)
        return None

    def last_words(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-2500:]


class Run:
    """All parts, and their JSON."""

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
        self.parts: dict[str, dict[str, Any]] = {}
        self.left_out: list[list[str]] = []

    def save(self) -> None:
        report = {
            **provenance(), "bench": "vllm-tp", "engine": self.engine, "parts": self.parts, "left_out": self.left_out,
        }  # fmt: skip
        (self.asked.output / "vllm-tp.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def folder(self, dims: str) -> Path:
        """The model, made at first use. A CPU takes the tiny one for all."""
        dims = "tiny" if self.asked.cpu else dims
        folder = self.work / f"model-{dims}"
        if not folder.exists():
            save_tiny(folder) if dims == "tiny" else save_config(folder, dims)
        return folder

    def part(self, part: str) -> dict[str, dict[str, Any]]:
        """Results by label, without the part's name."""
        wanted = self.asked.contenders
        contenders = [one for one in PARTS[part][1] if wanted is None or one[0] in wanted]
        results: dict[str, dict[str, Any]] = {}
        for together in [contenders] if part == "equal" else [[one] for one in contenders]:
            results |= self.side_by_side(part, together)
        return results

    def side_by_side(self, part: str, contenders: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
        left = self.end - time.monotonic()
        if left < CHILD_SECONDS / 2:
            self.left_out += [[part, f"{name}-{gpus}", "no time left"] for name, gpus in contenders]
            return {}
        deadline = time.monotonic() + min(left, CHILD_SECONDS)
        results: dict[str, dict[str, Any]] = {}
        children = [Child(part, name, gpus, at, self) for at, (name, gpus) in enumerate(contenders)]
        for child, (name, gpus) in zip(children, contenders, strict=True):
            if found := child.finish(deadline - time.monotonic()):
                results[f"{name}-{gpus}"] = found
                continue
            self.left_out.append([part, f"{name}-{gpus}", child.last_words()[-800:]])
            if name == "stock" and gpus == 2 and not self.engine and not self.asked.cpu:
                print("again, without vLLM's own all-reduce", flush=True)
                self.engine = {"disable_custom_all_reduce": True}
                results |= self.side_by_side(part, [(name, gpus)])
        return results


def child(told: dict[str, Any], folder: Path, result: Path) -> None:
    engine = {"tensor_parallel_size": told["gpus"], **told["engine"]}
    if told["part"] == "equal":
        answer = answered(folder, told["name"], **engine)
    elif told["cpu"]:
        vllm_gpu.SHORT, vllm_gpu.LONG = 4, 8
        answer = timed("tiny", folder, told["name"], ((4, 100),), 512, **engine)
    else:
        answer = timed(PARTS[told["part"]][0], folder, told["name"], SIZES, LONGEST, **engine)
    result.write_text(json.dumps(answer), encoding="utf-8")


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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=["stock", "delta", "local"], default=None)
    parser.add_argument("--seconds", type=float, default=560, help="for all of it")
    parser.add_argument("--no-custom-all-reduce", action="store_true", help="NCCL's all-reduce everywhere")
    parser.add_argument("--cpu", action="store_true", help="try the script itself, on vLLM's CPU build")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        told, folder, result = asked.child
        child(json.loads(told), Path(folder), Path(result))
        os._exit(0)  # at once: whoever waits ends the workers, which may take their time
    asked.output.mkdir(parents=True, exist_ok=True)
    run = Run(asked)
    if asked.no_custom_all_reduce:
        run.engine["disable_custom_all_reduce"] = True
    for part in asked.parts:
        results = run.part(part)
        run.parts[part] = compared(results) if part == "equal" else results
        run.save()
        if part == "equal":
            print(json.dumps(run.parts[part]), flush=True)
            continue
        steps = {name: result["shapes"][0]["tpot_ms"] for name, result in results.items()}
        if "delta-2" in steps and "local-2" in steps:
            print("ms a step:", steps, "global to local:", round(steps["delta-2"] / steps["local-2"], 4), flush=True)
    for what in run.left_out:
        print("left out:", *what, flush=True)
    return bool(run.left_out)


if __name__ == "__main__":
    sys.exit(main())
