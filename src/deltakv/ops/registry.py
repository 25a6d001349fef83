"""Registers an op with torch.library, so that `torch.compile` sees one opaque call with a known output shape."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("deltakv", "DEF")


class Lazy:
    """A module of GPU functions, imported when one of them is first called; they run where their first tensor is."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device, whatever its tensors say
                return getattr(importlib.import_module(self._module), name)(*args, **kwargs)

        return call


def register(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines `deltakv::<name>` from its schema and returns the callable.

    cpu, cuda: the versions for these devices; an op without a GPU kernel of its own gives a plain PyTorch version.
    fake: makes empty outputs of the right shape, dtype and device, without looking at data.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"deltakv::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.deltakv, name).default
    return op
