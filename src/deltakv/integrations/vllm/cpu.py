"""vLLM's CPU attention with decode rows made sparse.

Every output comes from vLLM's own kernel, so a row that keeps all its pages has stock bits: a REUSE or WINDOW
layer gives the kernel a shorter block table, and a SELECT layer works out the softmax of its sparse rows once more, to
score pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from deltakv.integrations.vllm.cpu_keys import places, row_keys
from deltakv.integrations.vllm.figures import figures_of
from deltakv.integrations.vllm.layout import NamedLayout
from deltakv.integrations.vllm.loaded import loaded_layout
from deltakv.integrations.vllm.rows import decode_rows, narrowed, sparse_rows
from deltakv.integrations.vllm.step import Step
from deltakv.integrations.vllm.support import check
from deltakv.methods import selector
from deltakv.ops import chunk_logits
from deltakv.plan import Role


class SparseCPUBackend(CPUAttentionBackend):
    """In the place of CPU_ATTN, because vLLM's CPU platform takes no other. Without settings it is the stock one."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        asked = check(get_current_vllm_config(), CPUAttentionBackend) is not None
        return SparseCPUImpl if asked else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SparseCPUBuilder


@dataclass
class SparseCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a step with sparse rows.

    shorten: vLLM's metadata anew, for another block table and other lengths. shortened: what the REUSE layers of each
    SELECT layer run on, by its name, and what WINDOW layers do, under None; made once for all of them, since the
    kernel's schedule depends on the lengths.
    """

    step: Step = field(kw_only=True)
    shorten: Callable[[Tensor, Tensor], CPUAttentionMetadata] = field(kw_only=True)
    shortened: dict[str | None, CPUAttentionMetadata] = field(default_factory=dict)

    def narrow(self, layer: str) -> CPUAttentionMetadata:
        """What a REUSE or WINDOW layer runs on: its block table, with what it attends to alone in the sparse rows."""
        source = self.step.layout.sources.get(layer)
        if source not in self.shortened:
            if source is None:
                picks = self.step.window()
            else:  # of this metadata, or of another block table's
                picks = get_forward_context().attn_metadata[source].step.picks[source]
            rows = self.step.rows
            pages, tokens = narrowed(rows.block_table, rows.seq_lens, picks, self.step.page_size)
            table, lens = self.block_table.clone(), self.seq_lens.clone()
            table[rows.rows, : pages.shape[1]] = pages
            lens[rows.rows] = tokens
            self.shortened[source] = self.shorten(table, lens)
        return self.shortened[source]


class SparseCPUBuilder(CPUAttentionMetadataBuilder):
    """Finds the sparse rows of each step."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layout = check(vllm_config, CPUAttentionBackend)
        self._layout: NamedLayout | None = None
        if layout is not None:
            self._layout = loaded_layout(layout, vllm_config, kv_cache_spec, layer_names)
            self._figures = figures_of(self._layout, layer_names, vllm_config.parallel_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        build, common, layout = super().build, common_attn_metadata, self._layout
        metadata = build(common_prefix_len, common, fast_build)
        if layout is None:
            return metadata
        decode = decode_rows(common)
        if self._figures is not None:
            self._figures.step(common.seq_lens[decode].tolist())
        rows = sparse_rows(common, decode, layout.settings.method)
        if not len(rows):
            return metadata

        def shorten(block_table: Tensor, seq_lens: Tensor) -> CPUAttentionMetadata:
            return build(0, common.replace(block_table_tensor=block_table, seq_lens=seq_lens))

        step = Step(layout, selector(layout.settings.method), rows)
        return SparseCPUMetadata(**vars(metadata), step=step, shorten=shorten)


class SparseCPUImpl(CPUAttentionBackendImpl):
    """Stock attention; in steps with sparse rows, what the layer's role asks for beside it."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        step = attn_metadata.step if isinstance(attn_metadata, SparseCPUMetadata) else None
        role = None if step is None else step.layout.roles.get(layer.layer_name)
        runs_on = attn_metadata
        if role in (Role.REUSE, Role.WINDOW):
            assert isinstance(attn_metadata, SparseCPUMetadata)
            runs_on = attn_metadata.narrow(layer.layer_name)
        out: Tensor = super().forward(
            layer, query, key, value, kv_cache, runs_on, output, output_scale, output_block_scale
        )
        if role is Role.SELECT:
            assert step is not None
            self._pick(step, layer, query, kv_cache)
        return out

    def _pick(self, step: Step, layer: Any, query: Tensor, kv_cache: Tensor) -> None:
        """After the layer has stored the current token and attended: what its sparse rows keep."""
        page_size, rows = step.page_size, step.rows
        # The instruction set is the layer's in 0.32, and the implementation's before.
        isa = getattr(layer, "isa", None) or self.isa
        where = places(kv_cache.dtype, page_size, self.head_size, isa)
        lengths = rows.seq_lens.tolist()
        width = -(-max(lengths) // page_size)
        logits = torch.full((len(rows), 1, self.num_heads, width * page_size), float("-inf"))
        lse = torch.empty((len(rows), self.num_heads))
        for row, length in enumerate(lengths):
            pages = rows.block_table[row, : -(-length // page_size)]
            keys = row_keys(kv_cache, pages, where)[:length]
            one, at = chunk_logits(query[rows.queries[row], None], keys, self.scale, self.sinks, page_size)
            logits[row, 0, :, : one.shape[2]] = one[0]
            lse[row] = at[0]
        step.pick(layer.layer_name, logits, torch.zeros_like(lse)[:, None], lse)
