"""The columns of a padded batch: what a step costs the host before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deltakv
from hf.harness import tokens

#: Elements from which on torch shares an op out among all cores (`at::internal::GRAIN_SIZE`).
GRAIN = 32768


class Largest(TorchDispatchMode):
    """The most elements of a tensor that torch has worked on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_laying_out_a_step_keeps_to_one_thread(tiny_model: Any) -> None:
    """The books of 60 rows of 600 columns are looked at in numpy: torch would wait for all cores, also busy ones."""
    model, ids = tiny_model("llama"), tokens(600).expand(60, -1)
    assert ids.numel() > GRAIN
    with torch.no_grad(), deltakv.apply(model, deltakv.Full()):
        cache = model(ids, logits_to_keep=1).past_key_values
        with Largest() as seen:
            assert cache.is_unpadded(60)
            step = cache.begin(60, 1, None)
            assert step.decode and step.real.shape == (60, 1)
        assert 0 < seen.elements < GRAIN
