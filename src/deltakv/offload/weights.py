"""Layers whose weights are in host memory too: each crosses once a step, to one of two places on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltakv.offload.lanes import Lane, Lanes
from deltakv.offload.memory import HostMemory, Records, take_room

#: Weights begin at multiples of this, and host memory holds them in units of it.
_UNIT = 256


class HostWeights:
    """The weights of equal layers, in host memory until `restore`; the layers' own parameters are views of the places.

    layers: the weights of each, in the order in which they cross; alike in shapes and dtypes. lanes: whose load lane
    they cross on, and who works with them. A layer may run between `wait` and `end`.
    Raises `OffloadError` if the host has no room; the layers then are as they were.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], lanes: Lanes, memory: HostMemory) -> None:
        self._layers, self._lanes = [list(weights) for weights in layers], lanes
        alike = {tuple((weight.shape, weight.dtype) for weight in weights) for weights in self._layers}
        assert len(alike) == 1, "layers that take turns in one place are alike"
        self._edges = [0]
        for weight in self._layers[0]:
            self._edges.append(self._edges[-1] + -(-weight.nbytes // _UNIT) * _UNIT)
        device = self._layers[0][0].device
        memory.check(self.nbytes * len(self._layers), f"the weights of {len(self._layers)} layers")
        with torch.inference_mode(False):
            self._places = [torch.zeros(self.nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        for place in self._places:
            lanes.load.keep(place)
        self._hosted = [Records(memory, 1, _UNIT) for _ in self._layers]
        take_room([(records, self.nbytes // _UNIT) for records in self._hosted])
        for index, weights in enumerate(self._layers):
            for weight, view in zip(weights, self._views(index), strict=True):
                view.copy_(weight.detach())
            self._copy(index, self._hosted[index], to_host=True)
        for index, weights in enumerate(self._layers):  # all are safe; from here on layers work with the places
            for weight, view in zip(weights, self._views(index), strict=True):
                weight.data = view
        self._arrived: list[Any] = []
        self._ended = 0
        self._last: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of a layer."""
        return self._edges[-1]

    def begin(self) -> None:
        """A step begins: its layers' weights cross in their order."""
        self._arrived, self._ended, self._last = [], 0, self._lanes.compute.mark()

    def fetch(self, layer: int) -> LayerFetch:
        return LayerFetch(self, layer)

    def wait(self, layer: int) -> None:
        """The layer's work, queued from now on, waits for its weights."""
        assert layer < len(self._arrived), "weights cross before their layer runs"
        self._lanes.compute.wait(self._arrived[layer])

    def end(self) -> None:
        """All work of the layer whose turn it was has been queued."""
        self._ended, self._last = self._ended + 1, self._lanes.compute.mark()

    def restore(self) -> None:
        """Gives each layer weights of its own again, on the device."""
        for index, weights in enumerate(self._layers):
            self._lanes.compute.wait(self._lanes.load.mark())
            self._copy(index, self._hosted[index], to_host=False)
            for weight, view in zip(weights, self._views(index), strict=True):
                weight.data = view.clone()
            self._hosted[index].release()

    def _views(self, layer: int) -> list[Tensor]:
        """The layer's weights in its place."""
        place = self._places[layer % 2]
        return [
            place[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            for start, weight in zip(self._edges, self._layers[layer], strict=False)
        ]

    def _copy(self, layer: int, records: Records, *, to_host: bool) -> None:
        """Between a layer's place and the host, waited for."""
        done, place = 0, self._places[layer % 2]
        for part in records.parts(0, self.nbytes // _UNIT):
            here, there = part.flatten(), place[done : done + part.numel()]
            here.copy_(there) if to_host else there.copy_(here)
            done += part.numel()


class LayerFetch:
    """A layer's weights on their way: see `loads.Fetch`."""

    def __init__(self, weights: HostWeights, layer: int) -> None:
        self._weights, self._layer = weights, layer

    def ready(self) -> bool:
        return self._layer < self._weights._ended + 2

    def queue(self, lane: Lane) -> None:
        weights, done = self._weights, 0
        place = weights._places[self._layer % 2]
        lane.wait(weights._last)
        for part in weights._hosted[self._layer].parts(0, weights.nbytes // _UNIT):
            lane.copy(place[done : done + part.numel()], part.flatten())
            done += part.numel()
        weights._arrived.append(lane.mark())
