"""Commands that are killed at random moments, ten times, and then left to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

KILLS = 10


def killed(folder: Path, words: list[str]) -> dict[str, Any]:
    """Runs the command line `words`, with {} for a folder to write in: undisturbed in `folder`/whole, and killed again
    and again in `folder`/cut, from outside and within writes by turns. Returns what `crash_driver.py` tells, and the
    seed of its moments."""
    driver = Path(__file__).with_name("crash_driver.py")
    seed = int.from_bytes(os.urandom(4), "big")
    command = [sys.executable, str(driver), str(KILLS), str(seed), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = {**json.loads(done.stdout.splitlines()[-1]), "seed": seed}
    assert told["killed"] == KILLS and told["torn"] > KILLS // 2, told
    assert len({*told["sizes"]}) > 2, told
    return told
