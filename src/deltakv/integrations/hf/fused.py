"""A decode step's projections, cut as a GPU likes them.

It reads each weight once and multiplies next to nothing. So a small product costs more for being one than for its
bytes (at 7B dimensions and batch 64 the K and V projections took 15 us where their bytes take 2), and those of one
input are taken as one: QKV, and a gated MLP's gate and up. Their weights are laid side by side and the model's own
become views of that, so memory stays what it was. And a product of many inputs with few outputs, an MLP's last, has
too few tiles for all multiprocessors; it is taken as two of half the inputs each, at once, and what comes next in a
compiled step, the residual's sum, adds three numbers for two.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from deltakv.errors import UnsupportedUseError

#: Attributes of one module whose linear layers take the same input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

#: Inputs for each output from which a product is taken in two.
_LONG = 4

#: Halves begin at a multiple of so many inputs, as tensor cores want them.
_ALIGNED = 16


def _is_step(x: Tensor) -> bool:
    """One token a row, and no gradients. Prompts go the model's own way: all results at once would take more memory."""
    return x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled()


class Fused:
    """Linear layers in the order in which they are called. At a step the first call computes for all, and the others
    hand out their share if they get the very same input."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._weight = _side_by_side([layer.weight for layer in layers])
        self._bias = None if layers[0].bias is None else _side_by_side([layer.bias for layer in layers])
        self._layers = layers
        # Replaced as one, so that threads may share a model.
        self._held: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def first(self, x: Tensor) -> Tensor:
        if not _is_step(x):
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
        """Raises `UnsupportedUseError` if the layers have got other weights or biases since."""
        weights, biases = [layer.weight for layer in self._layers], [layer.bias for layer in self._layers]
        if not (_lie_in(self._weight, weights) and _lie_in(self._bias, biases)):
            raise UnsupportedUseError(
                "the model was moved or cast, or its weights or biases were replaced, while a method was applied; "
                "remove the method first and apply it again afterwards, or apply it with fuse=False"
            )


def _halved(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` of x [rows, 1, in_features]: at a step, as two products of half the inputs."""
    if not _is_step(x):
        return nn.Linear.forward(layer, x)
    rows, half = x.shape[0], layer.in_features // 2
    weight = layer.weight.view(layer.out_features, 2, half).permute(1, 2, 0)
    out = torch.bmm(x.reshape(rows, 2, half).transpose(0, 1), weight).sum(0)[:, None]
    return out if layer.bias is None else out + layer.bias


def _lie_in(joint: Tensor | None, parts: list[nn.Parameter | None]) -> bool:
    """Whether the parts are what `_side_by_side` has made of them; None for what layers do not have."""
    if joint is None:
        return all(part is None for part in parts)
    at = joint.data_ptr()
    for part in parts:
        if part is None or part.data_ptr() != at:
            return False
        at += part.nbytes
    return True


def _side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    with torch.inference_mode(False):  # made in inference mode, they could not be trained on
        joint = torch.cat([parameter.data for parameter in parameters])
        for parameter, view in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
            parameter.data = view
    torch._dynamo.mark_static_address(joint)  # a captured graph reads it where it is, as it does parameters
    return joint


def fuse_projections(model: nn.Module, undo: contextlib.ExitStack) -> list[Fused]:
    """Fuses what can be: plain linear layers on one device, without hooks, that take the same input; and halves those
    of many inputs and few outputs. Returns the products that take the place of several. undo: gives every layer its own
    memory and forward back."""
    fused = []
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and _is_plain(module) and _is_long(module):
            undo.callback(module.__dict__.pop, "forward", None)
            module.__dict__["forward"] = partial(_halved, module)
        for names in _TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            if all(
                isinstance(layer, nn.Linear) and _is_plain(layer) and _is_own(layer, users) for layer in layers
            ) and all(_are_alike(one, other) for one, other in pairwise(layers)):
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


def _is_own(layer: nn.Linear, users: Counter[int]) -> bool:
    """Whether no parameter is tied to another layer's: it cannot lie in two places."""
    return all(users[id(parameter)] == 1 for parameter in layer.parameters(recurse=False))


def _is_long(layer: nn.Linear) -> bool:
    return layer.in_features >= _LONG * layer.out_features and layer.in_features % (2 * _ALIGNED) == 0


def _are_alike(one: nn.Linear, other: nn.Linear) -> bool:
    return (
        one.in_features == other.in_features
        and one.weight.dtype == other.weight.dtype
        and one.weight.device == other.weight.device
        and (one.bias is None) == (other.bias is None)
    )
