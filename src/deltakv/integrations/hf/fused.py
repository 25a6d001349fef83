"""Projections of one input as one product: QKV, and a gated MLP's gate and up.

A decode step on a GPU reads each weight once and multiplies next to nothing, so a small product costs more for being
one than for its bytes: at 7B dimensions and batch 64 the K and V projections took 15 us where their bytes take 2.
The weights are laid side by side and the model's own become views of that, so memory stays what it was.
"""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from deltakv.errors import UnsupportedUseError

#: Attributes of one module whose linear layers take the same input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Fused:
    """Linear layers in the order in which they are called. For one token a row, and without gradients, the first call
    computes for all, and the others hand out their share if they get the very same input. Prompts go one by one:
    there it saves nothing, and all results at once would take more memory."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._weight = _side_by_side([layer.weight for layer in layers])
        self._bias = None if layers[0].bias is None else _side_by_side([layer.bias for layer in layers])
        self._layers = layers
        self._held: tuple[Tensor, tuple[Tensor, ...]] | None = (
            None  # replaced as one, so that threads may share a model
        )

    def first(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dim() != 3 or x.shape[1] != 1:
            return nn.Linear.forward(self._layers[0], x)
        shares = nn.functional.linear(x, self._weight, self._bias).split(self._sizes, -1)
        self._held = (x, shares)
        return shares[0]

    def later(self, index: int, x: Tensor) -> Tensor:
        held = self._held
        if held is None or held[0] is not x:
            return nn.Linear.forward(self._layers[index], x)
        if index == len(self._layers) - 1:
            self._held = None
        return held[1][index]

    def check(self) -> None:
        """Raises `UnsupportedUseError` if the layers have got other weights since."""
        at = self._weight.data_ptr()
        for layer in self._layers:
            if layer.weight.data_ptr() != at:
                raise UnsupportedUseError(
                    "the model was moved or cast, or its weights were replaced, while a method was applied; remove the "
                    "method first and apply it again afterwards, or apply it with fuse=False"
                )
            at += layer.weight.nbytes


def _side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    joint = torch.cat([parameter.data for parameter in parameters])
    torch._dynamo.mark_static_address(joint)  # a captured graph reads it where it is, as it does parameters
    for parameter, view in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
        parameter.data = view
    return joint


def fuse_projections(model: nn.Module, undo: contextlib.ExitStack) -> list[Fused]:
    """Fuses what can be: plain linear layers on one device, without hooks, that take the same input. Returns the
    products that take the place of several. undo: gives every layer its own memory and forward back."""
    fused = []
    for module in list(model.modules()):
        for names in _TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Linear) and _is_plain(layer) for layer in layers) and all(
                _are_alike(one, other) for one, other in pairwise(layers)
            ):
                fused.append(_install(layers, undo))
    return fused


def _install(layers: list[nn.Linear], undo: contextlib.ExitStack) -> Fused:
    together = Fused(layers)
    for index, layer in enumerate(layers):
        for parameter in layer.parameters(recurse=False):
            undo.callback(_own, parameter)
        undo.callback(layer.__dict__.pop, "forward", None)
        layer.__dict__["forward"] = partial(together.later, index) if index else together.first
    return together


def _own(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.clone()


def _is_plain(layer: nn.Linear) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight.data) is Tensor
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def _are_alike(one: nn.Linear, other: nn.Linear) -> bool:
    return (
        one.in_features == other.in_features
        and one.weight.dtype == other.weight.dtype
        and one.weight.device == other.weight.device
        and (one.bias is None) == (other.bias is None)
    )
