"""The ops in C++ (`native.cpp` in each op's folder): compiled once on the user's machine, for its very processor.

Where that is not possible, the PyTorch versions run, and a warning says so once. They are loops that PyTorch has no
words for: following a block table, and reading each byte of the cache once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from deltakv.errors import UnsupportedUseError
from deltakv.folders import cache_folder

_OPS = Path(__file__).resolve().parent.parent
_SOURCES = [_OPS / op / "native.cpp" for op in ("decode_attention", "page_scores")]
_HEADERS = [_OPS / "native" / "simd.h"]
# No -ffast-math: logits hold -inf. The OpenMP runtime is not linked, so that its symbols are found in the one that
# torch has loaded: two thread pools on the same cores would fight.
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-c"]

_local = threading.local()


class NotNativeError(Exception):
    """Why the C++ ops cannot run here."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled ops, or None where PyTorch's run instead.

    `DELTAKV_NATIVE=0` asks for PyTorch's; `DELTAKV_NATIVE=1` makes it an `UnsupportedUseError` if the C++ ones cannot
    be had; otherwise that is a warning.
    """
    wish = os.environ.get("DELTAKV_NATIVE", "")
    if wish not in ("", "0", "1"):
        raise UnsupportedUseError(f"DELTAKV_NATIVE={wish!r} is neither 0 (PyTorch's CPU ops) nor 1 (the C++ ones)")
    if wish == "0":
        return None
    try:
        return build()
    except NotNativeError as reason:
        if wish == "1":
            raise UnsupportedUseError(f"DELTAKV_NATIVE=1, but {reason}") from None
        warnings.warn(
            f"attention on the CPU runs on PyTorch's own kernels, slower than the C++ ones: {reason}; "
            "set DELTAKV_NATIVE=0 if that is meant",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def build() -> ctypes.CDLL:
    """Compiles the ops, if that has not been done for this processor, `CXX` and source, and loads them.

    Raises `NotNativeError`.
    """
    if sys.platform != "linux":
        raise NotNativeError(f"they are built on Linux only, and this is {sys.platform}")
    path = cache_folder() / f"ops-{_key()}.so"
    try:
        if path.exists():
            with contextlib.suppress(OSError):  # a broken file is made anew
                return ctypes.CDLL(str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotNativeError(f"{path.name} in {path.parent} cannot be made or loaded ({error})") from None


def _key() -> str:
    """Changes with what the result depends on: sources, flags, `CXX`, and the processor that it is compiled for."""
    digest = hashlib.sha256(" ".join([*_FLAGS, _target(), os.environ.get("CXX", "")]).encode())
    for file in (*_SOURCES, *_HEADERS):
        digest.update(file.read_bytes())
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError as error:
        raise NotNativeError(f"the processor cannot be told ({error})") from None
    digest.update("".join(line for line in processor if line.startswith(("flags", "Features"))).encode())
    return digest.hexdigest()[:16]


def _target() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _compiler() -> list[str]:
    """The command's first words: `CXX` may hold options or a wrapper."""
    if own := shlex.split(os.environ.get("CXX", "")):
        return own
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NotNativeError("there is no C++ compiler (c++, g++ or clang++) on the PATH, and CXX is not set")


def _compile(path: Path) -> None:
    """The library appears by a rename of a finished one; of two processes that compile, the last one wins."""
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        commands = [
            [*compiler, *_FLAGS, _target(), "-I", str(_OPS / "native"), str(source), "-o", f"{folder}/{number}.o"]
            for number, source in enumerate(_SOURCES)
        ]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        complaints = [process.communicate()[1] for process in running]
        objects = [command[-1] for command in commands]
        if any(process.returncode for process in running):
            raise NotNativeError(f"{compiler[0]} failed: {' '.join(' '.join(complaints).split())[:300]}")
        link = subprocess.run(
            [*compiler, "-shared", *objects, "-o", f"{folder}/ops.so"], capture_output=True, text=True, check=False
        )
        if link.returncode:
            raise NotNativeError(f"{compiler[0]} failed to link: {' '.join(link.stderr.split())[:300]}")
        os.replace(f"{folder}/ops.so", path)


def running() -> str:
    """Which CPU ops run: "C++" or "PyTorch"."""
    return "PyTorch" if library() is None else "C++"


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's data begins."""
    return None if tensor is None else tensor.data_ptr()


def scratch(numbers: int) -> Tensor:
    """At least so many floats for intermediate results, kept by this thread: fresh pages cost more than the copy."""
    kept: Tensor | None = getattr(_local, "scratch", None)
    if kept is None or len(kept) < numbers:
        kept = _local.scratch = torch.empty(numbers)
    return kept
