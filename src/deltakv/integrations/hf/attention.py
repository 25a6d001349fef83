"""The attention function that stands in for a model's own, layer by layer."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.host_cache import HostCache
from deltakv.integrations.hf.layers import as_autocast
from deltakv.integrations.hf.positions import Positions
from deltakv.integrations.hf.selecting import Selecting
from deltakv.integrations.hf.step import Chunk, Step
from deltakv.offload.layer import Recompute
from deltakv.ops import decode_attention, prefill_attention, row_kv
from deltakv.plan import Role


class _Inference(torch.autograd.Function):
    """Passes attention's output on; asking for its gradient is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, _query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedUseError(
            "attention through a deltakv cache has no gradient; train with use_cache=False, or unapplied"
        )


class PagedAttention:
    """Attention of the planned layers through the paged cache; all other calls go to the model's own function.

    roles: the role of each planned layer, by its index in the model. selecting: what its SELECT and WINDOW layers
        do.
    original: the name of the attention implementation that the model had.
    recompute: by layer, how K and V are made from its input again; for a cache in host memory.
    """

    def __init__(
        self, roles: dict[int, Role], selecting: Selecting, original: str, recompute: dict[int, Recompute]
    ) -> None:
        self.roles = roles
        self.selecting = selecting
        self.original = original
        self.recompute = recompute
        self._thread = threading.local()
        self.positions: Positions | None = None

    @property
    def cache(self) -> PagedCache | None:
        """The cache of the forward under way in this thread."""
        return getattr(self._thread, "cache", None)

    @cache.setter
    def cache(self, cache: PagedCache | None) -> None:
        self._thread.cache = cache

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query [batch, n_heads, width, head_dim]; key, value: just the new ones, as `PagedLayer.update` returns them.

        Returns the output, [batch, width, n_heads, head_dim], and no weights.
        """
        layer = int(module.layer_idx)
        step = None if self.cache is None else self.cache.state.step
        role = self.roles.get(layer)
        if step is None or role is None:
            return self._original(module, query, key, value, attention_mask, scaling, dropout, kwargs)
        if dropout or kwargs.get("softcap") is not None:
            raise UnsupportedUseError(
                "attention dropout or soft-capping cannot go through a deltakv cache; use model.eval()"
            )
        step = step.of(layer)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = kwargs.get("s_aux")
        with torch.no_grad():
            query, key, value = (as_autocast(x) for x in (query, key, value))
            if isinstance(self.cache, HostCache):
                out = self.cache.attend(layer, query, key, value, scale, sinks, self.recompute.get(layer))
            elif self.positions is not None and isinstance(step, Chunk) and step.onto_past:
                out = self._evaluate(step, layer, role, query, scale, sinks)
            elif isinstance(step, Chunk) and not step.decode:
                out = self._prefill(step, layer, query, key, value, scale, sinks)
            else:
                out = self._decode(step, layer, role, query[:, :, 0], scale, sinks)[:, None]
        if torch.is_grad_enabled() and query.requires_grad:
            out = _Inference.apply(out, query)
        return out, None

    def mask(self, **kwargs: Any) -> Any:
        """In the place of the mask function: none is needed where the cache knows the padding."""
        step = None if self.cache is None else self.cache.state.step
        windowed = kwargs.get("local_size") is not None
        if step is None or (windowed and any(self.cache.windows)):  # type: ignore[union-attr]
            return ALL_MASK_ATTENTION_FUNCTIONS[self.original](**kwargs)
        return None

    def _original(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        dropout: float,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.original, eager)
        result: tuple[Tensor, Tensor | None] = function(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return result

    def _decode(self, step: Step, layer: int, role: Role, query: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        """One token a row: query and result [batch, n_heads, head_dim]."""
        assert self.cache is not None
        k_pool, v_pool = self.cache.state.pool.layer(layer)
        if role is Role.SELECT:
            known = self.cache.state.known
            return self.selecting.attend(step, known, layer, query, k_pool, v_pool, scale, sinks)
        if role is Role.REUSE:
            assert step.pick is not None, "a plan has a SELECT layer before any REUSE layer"
            table, lens = step.pick.on(query.device)
        elif role is Role.WINDOW:
            table, lens = self.selecting.window(step, layer, query.device).on(query.device)
        else:
            table, lens = step.on(query.device, "block_table"), step.on(query.device, "seq_lens")
        return decode_attention(query, k_pool, v_pool, table, lens, scale, sinks)

    def _prefill(
        self,
        step: Chunk,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Several tokens a row, with full attention in every role: [batch, width, n_heads, head_dim]."""
        assert self.cache is not None
        k_pool, v_pool = self.cache.state.pool.layer(layer)
        table, past, real = step.block_table, step.past_lens, step.real
        return prefill_attention(query, key, value, k_pool, v_pool, table, past, real, scale, sinks)

    @torch.compiler.disable
    def _evaluate(
        self, step: Chunk, layer: int, role: Role, query: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Several tokens a row, each as if decoded alone: [batch, width, n_heads, head_dim]."""
        assert self.cache is not None and self.positions is not None
        k_pool, v_pool = self.cache.state.pool.layer(layer)
        query = query.transpose(1, 2)
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        known = self.cache.state.known
        memories = [known.of_row(layer, row) if role is Role.SELECT else None for row in range(len(query))]
        for row, tokens in enumerate(step.append.lengths):
            columns = step.real[row].nonzero().flatten()
            if len(columns) == 0:
                continue
            k, v = row_kv(k_pool, v_pool, step.block_table[row, 0], tokens)
            seen = query[row, columns], k, v, scale, sinks
            out[row, columns], memories[row] = self.positions.attend(row, layer, role, *seen, memories[row])
        if kept := [memory for memory in memories if memory is not None]:
            kind = type(kept[0])
            names = (*kind.BY_PAGE, *kind.BY_ROW)
            step.memories[layer] = kind(**{name: torch.cat([getattr(x, name) for x in kept]) for name in names})
        return out
