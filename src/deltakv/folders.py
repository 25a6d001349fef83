"""Where files that are made once are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Converted models and compiled kernels: `$DELTAKV_CACHE`, `$XDG_CACHE_HOME/deltakv`, or `~/.cache/deltakv`."""
    if own := os.environ.get("DELTAKV_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "deltakv"
