"""Where and how a number was measured: stands at the head of every JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltakv.ops import native
from deltakv.version import __version__


def provenance(model: Any = None) -> dict[str, Any]:
    """Machine, versions, command, commit and time; with a model, its dtype and device too."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {
            "deltakv": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers")},
        },
        "threads": torch.get_num_threads(),
        "cpu_ops": native.running(),
    }
    if model is not None:
        facts["dtype"] = str(model.dtype).removeprefix("torch.")
        facts["device"] = str(model.device)
    return facts


def _program() -> str:
    """What was run, as a user would write it; `python -m deltakv` is the command of that name."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def _machine() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with `+changes` if sources differ; None outside a checkout of this project. A copy of one
    that has lost its history is told by DELTAKV_COMMIT."""
    told = os.environ.get("DELTAKV_COMMIT")
    if told:
        return told
    try:
        # An installed copy may lie inside another project's checkout (its virtual environment).
        if not _git("ls-files", Path(__file__).name):
            return None
        return _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*args: str) -> str:
    """What git says in this file's folder."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
