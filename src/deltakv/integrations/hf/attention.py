"""The attention function that stands in for a model's own, layer by layer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
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
from deltakv.integrations.hf.step import Chunk, Pick, Step
from deltakv.methods import Picks, Selector, SoftmaxStats
from deltakv.offload.layer import Recompute
from deltakv.ops import decode_attention, decode_attention_stats, prefill_attention, row_kv
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

    roles: the role of each planned layer, by its index in the model.
    kept_pages: the most pages that REUSE layers read of a row of so many tokens.
    original: the name of the attention implementation that the model had.
    recompute: by layer, how K and V are made from its input again; for a cache in host memory.
    """

    def __init__(
        self,
        roles: dict[int, Role],
        selector: Selector,
        kept_pages: Callable[[int], int],
        original: str,
        recompute: dict[int, Recompute],
    ) -> None:
        self.roles = roles
        self.selector = selector
        self.kept_pages = kept_pages
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
        if role is Role.REUSE:
            assert step.pick is not None, "a plan has a SELECT layer before any REUSE layer"
            table, lens = step.pick.on(query.device)
            return decode_attention(query, k_pool, v_pool, table, lens, scale, sinks)
        table, lens = step.on(query.device, "block_table"), step.on(query.device, "seq_lens")
        width = table.shape[-1]
        if role is Role.SELECT and self.kept_pages(width * self.cache.page_size) == width:
            # Not even a row that fills the table would lose a page. A shape says so, so a graph holds no trace of it.
            step.pick = _everything(layer, table, lens, self.cache.page_size)
            step.picks.append(step.pick)
            role = Role.FULL
        if role is Role.FULL:
            return decode_attention(query, k_pool, v_pool, table, lens, scale, sinks)
        out, logits, peaks, lse = decode_attention_stats(query, k_pool, v_pool, table, lens, scale, sinks)
        page_size = self.cache.page_size
        picks = self.selector.pick(SoftmaxStats(logits, peaks, lse, lens[:, 0], page_size))
        missing = -lens[:, 0] % page_size  # empty slots of the last page
        step.pick = Pick(
            layer=layer,
            pages=picks,
            block_table=table[:, 0].gather(1, picks.pages.long())[:, None],
            seq_lens=(picks.n_kept * page_size - missing)[:, None],
        )
        step.picks.append(step.pick)
        return out

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
        for row, tokens in enumerate(step.append.lengths):
            columns = step.real[row].nonzero().flatten()
            if len(columns) == 0:
                continue
            k, v = row_kv(k_pool, v_pool, step.block_table[row, 0], tokens)
            out[row, columns] = self.positions.attend(row, layer, role, query[row, columns], k, v, scale, sinks)
        return out


def _everything(layer: int, block_table: Tensor, seq_lens: Tensor, page_size: int) -> Pick:
    """The pick of a SELECT layer whose rows keep all their pages. Arguments: the layer's index; as in `Step`."""
    n_pages = (seq_lens[:, 0] + page_size - 1) // page_size
    pages = torch.arange(block_table.shape[-1], dtype=torch.int32, device=block_table.device)
    kept = torch.where(pages < n_pages[:, None], pages, 0)
    return Pick(layer, Picks(kept, n_pages), block_table, seq_lens)
