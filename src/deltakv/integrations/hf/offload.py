"""`apply(..., kv_device="host")`: from what a user asks for and a model to a cache in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltakv.config import Full, Method
from deltakv.errors import ConfigError, UnsupportedUseError
from deltakv.integrations.hf.host_cache import HostCache
from deltakv.integrations.hf.profiling import known_or_measured
from deltakv.integrations.hf.recompute import attention_modules, capture, recompute_of, why_not
from deltakv.integrations.hf.shapes import layer_shape
from deltakv.offload.config import Host
from deltakv.offload.layer import Recompute
from deltakv.offload.planner import FixedShare, Planner, Splitter
from deltakv.offload.profile import Profile
from deltakv.offload.rows import HostRows
from deltakv.offload.scheduler import LayerShape, Rates, Schedule, too_wide


def host_config(kv_device: Any) -> Host | None:
    """What `kv_device` means: None for the model's own device. Raises `ConfigError`."""
    if isinstance(kv_device, Host):
        return kv_device
    if kv_device == "host":
        return Host()
    if kv_device == "device":
        return None
    raise ConfigError(f"kv_device={kv_device!r} is not 'device', 'host' or a deltakv.Host(...)")


class Offload:
    """K and V of a model's planned layers in host memory.

    shape: of a layer. splitter: how much is recomputed; reason: why nothing is, or "".
    recompute: for each layer that may be recomputed, how.
    Raises `UnsupportedUseError` or `ConfigError`.
    """

    def __init__(self, model: Any, method: Method, host: Host, layers: Sequence[int]) -> None:
        if not isinstance(method, Full):
            raise UnsupportedUseError(
                f"kv_device='host' reads the whole cache in every layer, and {method.algorithm!r} picks pages of a "
                "pool on the device; use deltakv.Full()"
            )
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise UnsupportedUseError("kv_device='host' needs a model on one device, and this one is on several")
        self.host, self.layers = host, tuple(layers)
        self.shape = layer_shape(model.config, model.dtype, host.bits)
        self.splitter, self.reason = self._splitter(model)
        self.recompute: dict[int, Recompute] = {}
        if not self.reason:
            self.recompute = {layer: recompute_of(model, layer) for layer in layers}

    def install(self, model: Any, undo: contextlib.ExitStack) -> None:
        """Hooks that show the cache what K and V are made from."""
        modules = attention_modules(model) if self.recompute else []
        for layer in self.recompute:
            undo.callback(modules[layer].register_forward_pre_hook(capture, with_kwargs=True).remove)

    def new_cache(self, windows: Sequence[int | None], page_size: int, max_length: int | None) -> HostCache:
        return HostCache(windows, HostRows(self.layers, page_size, self.host, self.splitter), max_length)

    def _splitter(self, model: Any) -> tuple[Splitter, str]:
        """How much to recompute, and why nothing, if so."""
        host, schedule = self.host, Schedule(self.host.schedule)
        obstacle = why_not(model)
        if host.recompute != "auto":
            share = float(host.recompute)
            if share and obstacle:
                raise UnsupportedUseError(f"recompute={share:g}: {obstacle}; use recompute='auto' or 0")
            return FixedShare(share, schedule), "" if share else "recompute=0 was asked for"
        if not obstacle and self.shape.alpha >= self.shape.kappa:
            obstacle = too_wide(self.shape)
        if not obstacle and not has_bus(model.device):
            obstacle = "the model runs on the CPU: host and device are one memory, and there is no bus to relieve"
        if obstacle:
            return FixedShare(0.0, schedule), obstacle
        profile = _profile(model, host)

        def rates(shape: LayerShape, batch: int, length: int) -> Rates:
            return profile.rates(shape, batch, length, host.chunk_bytes, pinned=host.pinned)

        return Planner([self.shape] * model.config.num_hidden_layers, rates, schedule), ""


def has_bus(device: torch.device) -> bool:
    """Whether there is anything to cross between host and device."""
    return device.type != "cpu"


def _profile(model: Any, host: Host) -> Profile:
    """Measured rates: a file, or this machine's, which are measured the first time."""
    return Profile.load(Path(host.profile), model.dtype) if host.profile is not None else known_or_measured(model)
