"""Tensors in, tensors out. One folder an op: `naive.py` (plain PyTorch, read it first) and faster versions.

A row is one query position of one sequence: a sequence at a decode step, or, in evaluation mode, one of several
positions of the same sequence. Every op gives a row the same result whatever rows stand beside it.
"""

from deltakv.ops.bound_scores import bound_scores
from deltakv.ops.chunk_attention import chunk_attention, chunk_logits
from deltakv.ops.decode_attention import decode_attention, decode_attention_into, decode_attention_stats
from deltakv.ops.interleaved import interleaved
from deltakv.ops.narrow_table import narrow_table
from deltakv.ops.page_masses import page_masses
from deltakv.ops.page_scores import page_scores
from deltakv.ops.partial_attention import accumulate, merge, partial_attention, within
from deltakv.ops.prefill_attention import prefill_attention, row_kv
from deltakv.ops.select_mass import select_mass
from deltakv.ops.select_pages import select_pages
from deltakv.ops.store_kv import store_kv

__all__ = [
    "accumulate",
    "bound_scores",
    "chunk_attention",
    "chunk_logits",
    "decode_attention",
    "decode_attention_into",
    "decode_attention_stats",
    "interleaved",
    "merge",
    "narrow_table",
    "page_masses",
    "page_scores",
    "partial_attention",
    "prefill_attention",
    "row_kv",
    "select_mass",
    "select_pages",
    "store_kv",
    "within",
]
