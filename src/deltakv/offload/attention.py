"""Attention of a step's new tokens, over themselves and then over chunk after chunk of their past."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops import accumulate, merge, partial_attention, prefill_attention, within

#: Logits at once, in elements of fp32: 128 MiB. Queries are taken in blocks that keep to it.
_LOGITS = 1 << 25


class Attention:
    """One layer's attention in the making: the output so far and its log-sum-exp, in fp32.

    query: [rows, n_heads, width, head_dim]. past: tokens of each row before these; all are visible to all new ones.
    lengths: the same where the query is, int64 [rows], if rows differ.
    """

    def __init__(self, query: Tensor, past: list[int], scale: float, lengths: Tensor | None = None) -> None:
        self._query, self._past, self._scale, self._lengths = query, past, scale, lengths
        # Without a past: what full attention of the new tokens needs, all at once.
        self._new: tuple[Tensor, Tensor, Tensor] | None = None
        rows, n_heads, width, dim = query.shape
        if any(past):
            self._out = torch.zeros((rows, n_heads, width, dim), dtype=torch.float32, device=query.device)
            self._lse = torch.full((rows, n_heads, width), float("-inf"), device=query.device)

    def among_themselves(self, k: Tensor, v: Tensor, real: Tensor) -> None:
        """The new tokens, causally. k, v: [rows, kv_heads, width, head_dim]; real: bool [rows, width] on the CPU."""
        if not any(self._past):
            self._new = (k, v, real)
            return
        width = k.shape[2]
        seen = None if bool(real.all()) else real.to(k.device)
        k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
        if width == 1:  # as many tokens to be seen as are there: one or none
            self._accumulate(k, v, 0, None if seen is None else seen[:, 0].long())
            return
        for block in self._blocks(width):
            end = block.stop
            causal = torch.arange(end, device=k.device) <= torch.arange(block.start, end, device=k.device)[:, None]
            visible = causal[None, None] if seen is None else causal & seen[:, None, None, :end]
            self._add(block, k[:end], v[:end], visible)

    def over(self, k: Tensor, v: Tensor, start: int) -> None:
        """The tokens from `start` on of every row, as far as a row has them. k, v: [tokens, rows, kv_heads,
        head_dim]."""
        tokens, visible = len(k), None
        lengths = self._lengths if start + tokens > min(self._past) else None
        if self._query.shape[2] == 1:
            self._accumulate(k, v, start, lengths)
            return
        if start + tokens > min(self._past):
            assert lengths is not None, "rows of one length have all tokens of a piece"
            visible = within(lengths, start, tokens)
        for block in self._blocks(tokens):
            self._add(block, k, v, visible)

    def result(self, sinks: Tensor | None) -> Tensor:
        """[rows, width, n_heads, head_dim] in the query's dtype. sinks: [n_heads] or None."""
        query = self._query
        if self._new is not None:
            k, v, real = self._new
            none = torch.zeros((len(real), 1, 0), dtype=torch.int32)
            past = torch.tensor(self._past, dtype=torch.int32)
            return prefill_attention(query, k, v, k, v, none, past, real, self._scale, sinks)
        out = self._out
        if sinks is not None:
            out = out * torch.sigmoid(self._lse - sinks.float()[:, None])[..., None]
        return out.to(query.dtype).transpose(1, 2)

    def _accumulate(self, k: Tensor, v: Tensor, start: int, lengths: Tensor | None) -> None:
        """One token a row: `over` in place."""
        accumulate(self._query, k, v, self._scale, self._out, self._lse, start, lengths)

    def _add(self, block: slice, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
        part = partial_attention(self._query[:, :, block], k, v, self._scale, visible)
        out, lse = merge(self._out[:, :, block], self._lse[:, :, block], *part)
        self._out[:, :, block], self._lse[:, :, block] = out, lse

    def _blocks(self, tokens: int) -> list[slice]:
        """Queries in blocks whose logits over `tokens` tokens are not too many."""
        rows, n_heads, width, _ = self._query.shape
        step = max(1, _LOGITS // (rows * n_heads * tokens))
        return [slice(start, min(start + step, width)) for start in range(0, width, step)]
