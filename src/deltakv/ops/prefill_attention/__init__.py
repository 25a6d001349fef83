"""Full attention of several query tokens a row: prefill, a second turn, a chunk of a prompt, verification."""

from __future__ import annotations

from torch import Tensor

from deltakv.ops.prefill_attention import by_row
from deltakv.ops.prefill_attention.by_row import row_kv
from deltakv.ops.registry import register


def _fake(q: Tensor, *_: object) -> Tensor:
    rows, n_heads, width, head_dim = q.shape
    return q.new_empty((rows, width, n_heads, head_dim))


prefill_attention = register(
    "prefill_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor past_lens, Tensor real, float scale, Tensor? sinks=None) -> Tensor",
    cpu=by_row.prefill_attention,
    cuda=by_row.prefill_attention,
    fake=_fake,
)

__all__ = ["prefill_attention", "row_kv"]
