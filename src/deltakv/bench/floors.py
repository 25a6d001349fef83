"""Bytes that a decode step must read: weights, and K and V by layer. Bandwidth makes them a floor on time.

From a config alone: parameters are counted on the meta device, which holds none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltakv.config import Method
from deltakv.plan import LayerPlan, Role


@dataclass(frozen=True)
class LayerCost:
    """A layer of the model. role: its letter in the plan, or "window" for a layer with a sliding window."""

    index: int
    role: str
    bytes_a_token: int
    window: int | None = None

    def tokens(self, length: int, method: Method) -> int:
        """Tokens' worth of K and V that a row of `length` tokens, the current one included, reads in this layer."""
        if self.window is not None:
            return min(length, self.window)
        if self.role == Role.SELECT.value:
            return method.select_tokens(length)
        in_part = self.role in (Role.REUSE.value, Role.WINDOW.value)
        return method.kept_tokens(length) if in_part else length


@dataclass(frozen=True)
class StepCost:
    """What a decode step of a model reads under a method."""

    plan: LayerPlan
    layers: list[LayerCost]
    dense_bytes: int
    expert_bytes: int
    expert_share: float

    def weight_bytes(self, batch: int) -> float:
        """Bytes of weights; of a mixture's experts those that `batch` rows are expected to reach."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** batch)

    def kv_bytes(self, length: int, batch: int, method: Method) -> dict[str, int]:
        """Bytes of K and V by role, for `batch` rows of `length` tokens."""
        read: dict[str, int] = {}
        for layer in self.layers:
            read[layer.role] = read.get(layer.role, 0) + batch * layer.bytes_a_token * layer.tokens(length, method)
        return read

    def attended_tokens(self, length: int, method: Method) -> int:
        """Tokens a step and row, summed over the planned layers."""
        return sum(layer.tokens(length, method) for layer in self.layers if layer.window is None)


def step_cost(config: Any, windows: tuple[int | None, ...], method: Method, dtype: Any) -> StepCost:
    """The costs of a model by its text config. windows: each layer's sliding window or None."""
    planned = [index for index, window in enumerate(windows) if window is None]
    plan = method.layer_plan(len(planned))
    roles = {index: role.value for index, role in zip(planned, plan.roles, strict=True)}
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * heads * head_dim * dtype.itemsize
    layers = [LayerCost(index, roles.get(index, "window"), a_token, window) for index, window in enumerate(windows)]
    dense, experts = _parameters(config)
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    share = active / count if count and active else 1.0
    return StepCost(plan, layers, dense * dtype.itemsize, experts * dtype.itemsize, share)


def _parameters(config: Any) -> tuple[int, int]:
    """Parameters that a step reads, and those in experts. Embeddings, of tokens or of positions, give rows only; one
    that is tied to the head is read as the head."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and (head.weight is embedding or config.tie_word_embeddings)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    dense = experts = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in tables and not (tied and parameter is embedding):
            continue
        if ".experts." in name:
            experts += parameter.numel()
        elif not (tied and head is not None and parameter is head.weight and parameter is not embedding):
            dense += parameter.numel()
    return dense, experts
