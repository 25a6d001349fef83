"""Runs a command over and over in processes that are killed at random moments: `python crash_driver.py KILLS SEED OUT
WORDS...`, where WORDS are the command line but for its --out.

Everything is imported once and forked, so that a life begins at once; each is a process of its own all the same.
Prints as JSON how many lives ended by SIGKILL, and how far each had come.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)  # before the first fork, so that there is no pool of threads that a child would miss

import lm_eval.evaluator  # noqa: E402, F401
import math_verify  # noqa: E402, F401

from deltakv.cli import main  # noqa: E402


def call(words: list[str]) -> int:
    """The command in this process; its exit code."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(words)
    except SystemExit as exit_:
        return int(exit_.code or 0)


def life(words: list[str]) -> int:
    """A process with this command; its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        code = call(words)
    finally:
        os._exit(code)


def finish(words: list[str]) -> float:
    start = time.perf_counter()
    _, status = os.waitpid(life(words), 0)
    assert status == 0, f"the command failed: {status}"
    return time.perf_counter() - start


def written(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*.jsonl"))


def run(kills: int, seed: int, out: Path, words: list[str]) -> dict[str, object]:
    whole, cut = out / "whole", out / "cut"
    assert call([*words, "--out", str(out / "first")]) == 0  # what is imported late is imported now
    seconds = finish([*words, "--out", str(whole)])
    again = finish([*words, "--out", str(whole)])  # with nothing left to answer: what each life needs to begin
    rng = random.Random(seed)
    killed, sizes = 0, []
    for _ in range(kills):
        child = life([*words, "--out", str(cut)])
        time.sleep(rng.uniform(0, again + 1.6 * (seconds - again) / kills))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        sizes.append(written(cut))
    finish([*words, "--out", str(cut)])
    return {"killed": killed, "sizes": sizes, "seconds": seconds, "again": again}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
