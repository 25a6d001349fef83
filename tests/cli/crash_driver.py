"""Runs a command over and over in processes that die at random moments: `python crash_driver.py KILLS SEED OUT
WORDS...`, where WORDS are the command line, with {} for where a life writes.

Each life that is killed from outside is followed by one that dies in the middle of a write: the system lets a file grow
to so many bytes, and ends the process at the next one. A kill by the clock all but never falls there.

Everything is imported once and forked, so that a life begins at once; each is a process of its own all the same.
Prints as JSON how many lives ended by SIGKILL and within a write, and how far each had come.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import resource
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


def life(words: list[str], longest_file: int = resource.RLIM_INFINITY) -> int:
    """A process with this command; its id. longest_file: in bytes; writing beyond it ends the process."""
    if child := os.fork():
        return child
    code = 1
    try:
        if longest_file != resource.RLIM_INFINITY:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an error of it, and go on
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, longest_file))
        code = call(words)
    finally:
        os._exit(code)


def written(out: Path) -> list[tuple[str, int, int]]:
    """What stands in a folder: each file's name, size and time."""
    found = []
    for path in sorted(out.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # it was replaced in between
            stat = path.stat()
            found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return found


def next_tear(out: Path, rng: random.Random) -> int:
    """A length at which the next write is likely to end: to what was last written, or to a file that is new."""
    files = [(time, size) for _, size, time in written(out)]
    last = max(files)[1] if files else 0
    return rng.choice((0, last)) + rng.randrange(1, 200)


def wait_for_changes(out: Path, child: int, most: float = math.inf) -> int:
    """Until so many changes have been seen in a folder, or the child has ended; how many were seen."""
    before, seen = written(out), 0
    while seen < most and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = written(out)
        seen += now != before
        before = now
        time.sleep(0.001)
    return seen


def finish(out: Path, words: list[str]) -> int:
    """The command to its end; how many changes were seen."""
    child = life(words)
    seen = wait_for_changes(out, child)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the command failed: {status}"
    return seen


def run(kills: int, seed: int, out: Path, words: list[str]) -> dict[str, object]:
    def into(folder: str) -> list[str]:
        (out / folder).mkdir(exist_ok=True)
        return [word.replace("{}", str(out / folder)) for word in words]

    assert call(into("first")) == 0  # what is imported late is imported now
    steps = finish(out / "whole", into("whole"))
    rng = random.Random(seed)
    killed, torn, sizes = 0, 0, []

    def ended(child: int, by: signal.Signals) -> bool:
        _, status = os.waitpid(child, 0)
        sizes.append(sum(size for _, size, _ in written(out / "cut")))
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == by

    for _ in range(kills):
        child = life(into("cut"))
        # All of them together do not end it: a third of it is theirs, for some changes are not seen, and lives that die
        # within a write come on, too.
        wait_for_changes(out / "cut", child, rng.randint(0, max(min(1, steps // kills), steps // (3 * kills))))
        time.sleep(rng.uniform(0, 0.01))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        killed += ended(child, signal.SIGKILL)
        torn += ended(life(into("cut"), next_tear(out / "cut", rng)), signal.SIGXFSZ)
    finish(out / "cut", into("cut"))
    return {"killed": killed, "torn": torn, "steps": steps, "sizes": sizes}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
