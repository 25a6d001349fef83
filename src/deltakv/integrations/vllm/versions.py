"""The vLLM versions that are checked, and what is said on any other one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from deltakv.errors import UnsupportedUseError

#: Minor releases whose attention interface is tested against, each with its first good patch release.
CHECKED = {(0, 26): 0, (0, 27): 1, (0, 32): 0}

#: The same on a GPU: those whose FlashAttention backend lays out K and V as the GPU backend reads them.
CHECKED_ON_GPU = {(0, 26): 0, (0, 27): 1}


def is_checked(version: str, checked: Mapping[tuple[int, int], int] = CHECKED) -> bool:
    """Whether deltakv works inside this vLLM; `version` is `vllm.__version__`, with or without a build's suffix."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None:
        return False
    major, minor, patch = map(int, found.groups())
    return patch >= checked.get((major, minor), patch + 1)


def require() -> None:
    """Raises `UnsupportedUseError` on a vLLM that is not checked: before anything of it is asked for that it may have
    moved."""
    import vllm

    if not is_checked(vllm.__version__):
        raise UnsupportedUseError(advice(vllm.__version__))


def advice(version: str, checked: Mapping[tuple[int, int], int] = CHECKED) -> str:
    """Why deltakv does not run inside this vLLM, and what to do."""
    ranges = ", ".join(f"{major}.{minor} from {major}.{minor}.{patch}" for (major, minor), patch in checked.items())
    where = " on a GPU" if checked is CHECKED_ON_GPU else ""
    return (
        f"deltakv is not checked on vLLM {version}{where}; checked are {ranges}: install one of these, "
        'or leave out --attention-backend CUSTOM and the "deltakv" of --additional-config'
    )
