"""vLLM's FlashAttention backend with decode rows taken away from it, for NVIDIA GPUs.

Prompts and their chunks go to FlashAttention as ever. Rows with one token go to deltakv's own ops, in every planned
layer: FULL ones, too, because a captured graph holds one kernel and its rows may be of any length.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from deltakv.errors import UnsupportedModelError, UnsupportedUseError
from deltakv.integrations.vllm.figures import figures_of
from deltakv.integrations.vllm.gpu_batch import behind, last_of_prompts, one_token_rows
from deltakv.integrations.vllm.gpu_step import DecodeStep
from deltakv.integrations.vllm.layout import NamedLayout
from deltakv.integrations.vllm.loaded import loaded_layout
from deltakv.integrations.vllm.support import check
from deltakv.methods import selector

#: Seconds between two looks at the counts from outside: a step is a few milliseconds, a file takes a part of one.
FIGURES_SECONDS = 1.0


class SparseGPUBackend(FlashAttentionBackend):
    """CUSTOM on an NVIDIA GPU. What it takes is what FlashAttention takes, less what the decode kernel does not."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks its members up by this name

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        if importlib.util.find_spec("triton") is None:
            raise UnsupportedUseError(
                "deltakv's GPU ops are written in Triton, which is not installed; install triton, or leave out "
                '--attention-backend CUSTOM and the "deltakv" of --additional-config'
            )
        check(get_current_vllm_config(), SparseGPUBackend)
        return SparseGPUImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return SparseGPUBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= 256 and super().supports_head_size(head_size)

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False  # its ranges are told by a row's place in the batch, and prompts are moved to the front of theirs


@dataclass
class SplitMetadata:
    """A step with one-token rows, which stand before all others.

    decode: these rows. prompts: FlashAttention's metadata of the rows behind them, None if there are none.
    """

    decode: DecodeStep
    prompts: FlashAttentionMetadata | None


class SparseGPUBuilder(FlashAttentionMetadataBuilder):
    """Splits a step into one-token rows and the rest, by what the host knows: it never waits for the device.

    A captured graph holds the decode step, and reads what vLLM keeps in place for it, block table and lengths, and
    what the builder keeps: which rows read the last token of a prompt. All that follows from these, picks too, is
    computed inside the graph, in its own memory.
    """

    #: vLLM puts rows with one token before all others.
    reorder_batch_threshold: int | None = 1
    supports_update_block_table: bool = False
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layout = check(vllm_config, SparseGPUBackend)
        assert layout is not None, "CUSTOM without settings is refused"
        self._layout: NamedLayout = loaded_layout(layout, vllm_config, kv_cache_spec, layer_names)
        planned = [name for name in layer_names if name in self._layout.roles]
        if planned and len(planned) < len(layer_names):
            raise UnsupportedModelError(
                f"vLLM makes one metadata for {planned[0]} and for layers that are not in the plan; leave deltakv out"
            )
        self._planned = bool(planned)  # layers with a window have a builder of their own, which is the stock one
        most = max(vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0)
        self._prompts = torch.zeros(most, dtype=torch.bool, device=device)
        self._any_prompts = False
        self._figures = figures_of(self._layout, layer_names, vllm_config.parallel_config, FIGURES_SECONDS)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata | SplitMetadata:
        common = common_attn_metadata
        count = one_token_rows(common) if self._planned else 0
        if count:
            prompts = last_of_prompts(common, count)
            self._mark(prompts)
            self._count(common, prompts)
        return self._split(common, count, fast_build)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata | SplitMetadata:
        """As a step in which no row reads a prompt; a replay finds what `build` has marked."""
        return self._split(common_attn_metadata, one_token_rows(common_attn_metadata) if self._planned else 0, False)

    def _mark(self, prompts: Tensor) -> None:
        """prompts: bool [rows], on the CPU. Seldom any: nothing is sent where nothing was and is marked."""
        any_now = bool(prompts.any())
        if self._any_prompts:
            self._prompts.zero_()
        if any_now:
            # Pinned memory of its own, which lives until the copy is through: the next step may be on its way by then.
            source = prompts.pin_memory() if self._prompts.is_cuda else prompts
            self._prompts[: len(prompts)].copy_(source, non_blocking=True)
        self._any_prompts = any_now

    def _count(self, common: CommonAttentionMetadata, prompts: Tensor) -> None:
        """Live figures. Lengths on the host are upper bounds that are exact without speculative decoding, which is
        refused; padding has none."""
        if self._figures is None:
            return
        assert common.seq_lens_cpu_upper_bound is not None, "this vLLM does not tell lengths to the host"
        lengths = common.seq_lens_cpu_upper_bound[: len(prompts)]
        self._figures.step(lengths[(lengths > 0) & ~prompts].numpy())

    def _split(
        self, common: CommonAttentionMetadata, count: int, fast_build: bool
    ) -> FlashAttentionMetadata | SplitMetadata:
        """count: rows with one token, of which the planned layers take care."""
        if not count:
            return super().build(0, common, fast_build)
        step = DecodeStep(
            self._layout,
            selector(self._layout.settings.method),
            common.block_table_tensor[:count],
            common.seq_lens[:count],
            self._prompts[:count],
        )
        prompts = super().build(0, behind(common, count), fast_build) if count < common.num_reqs else None
        return SplitMetadata(step, prompts)

    def use_cascade_attention(self, *_: Any, **__: Any) -> bool:
        """Never: it reads a batch's common prefix once for all rows, and each row has picks of its own."""
        return False


class SparseGPUImpl(FlashAttentionImpl):
    """Decode rows by deltakv's ops on vLLM's own cache, the others by FlashAttention."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata | SplitMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attn_metadata, SplitMetadata):
            # As they are: four slices a layer are a noticeable part of a short prompt's launches.
            scales = output_scale, output_block_scale
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return output
        step, name = attn_metadata.decode, layer.layer_name
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("deltakv does not quantise the output of attention")
        if attn_metadata.prompts is not None:
            behind_them = (x[step.rows :] for x in (query, key, value))
            super().forward(layer, *behind_them, kv_cache, attn_metadata.prompts, output[step.rows :])
        # The layout of 0.26 and 0.27: logical [blocks, heads, tokens, K and V side by side], any strides.
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        decode_output = output[: step.rows].view(step.rows, self.num_heads, self.head_size)
        decode_query = query[: step.rows].view(step.rows, self.num_heads, self.head_size)
        step.attend(name, _step_of, decode_query, k_cache, v_cache, self.scale, self.sinks, decode_output)
        return output


def _step_of(layer: str) -> DecodeStep:
    """The step of a layer: this one, or that of another block table."""
    step: DecodeStep = get_forward_context().attn_metadata[layer].decode
    return step
