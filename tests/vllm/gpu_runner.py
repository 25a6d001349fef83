"""What vLLM's newer model runner hands the GPU backend, on CPU tensors: called by test_gpu_backend.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu_parts import PAGE, WIDTH, make_layout


def second_runner() -> None:
    """vLLM's newer model runner, the one for dense models on a GPU: its captures, padded replays and mixed batches."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
    from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from deltakv.integrations.vllm import gpu

    # Of FlashAttention's metadata only what it is asked for.
    gpu.FlashAttentionMetadataBuilder.build = lambda _, prefix, common, fast: common
    builder = gpu.SparseGPUBuilder.__new__(gpu.SparseGPUBuilder)
    builder._planned, builder._layout, builder._figures = True, make_layout(), None
    builder._prompts, builder._any_prompts = torch.zeros(8, dtype=torch.bool), False
    buffers = InputBuffers(8, 64, torch.device("cpu"))
    tables = torch.arange(8 * WIDTH, dtype=torch.int32).view(8, WIDTH)
    groups = [[SimpleNamespace(get_metadata_builder=lambda _: builder, layer_names=["layers.0", "layers.1"])]]
    state = SimpleNamespace(max_model_len=WIDTH * PAGE, supports_mm_inputs=False, encoder_cache=None, model_config=None)

    def prepared(batch: Any, mode: Any, capture: bool = False) -> Any:
        tokens = batch.num_tokens_after_padding
        found = DefaultModelState.prepare_attn(
            state, batch, mode, (tables[: batch.num_reqs_after_padding],), torch.zeros((1, tokens)).long(), groups,
            SimpleNamespace(kv_cache_groups=[None]), for_capture=capture,
        )  # fmt: skip
        assert found["layers.0"] is found["layers.1"], "one metadata for the layers of a block table"
        return found["layers.0"]

    def scheduled(tokens: list[int], lens: list[int], prefilling: list[bool], padded: int) -> Any:
        count = len(tokens)
        starts = np.full(padded + 1, sum(tokens), dtype=np.int32)
        starts[: count + 1] = np.cumsum([0, *tokens])
        buffers.seq_lens[:] = torch.tensor(lens + [0] * (8 - count), dtype=torch.int32)
        buffers.query_start_loc[: padded + 1] = torch.from_numpy(starts)
        upper = torch.tensor(lens + [0] * (padded - count), dtype=torch.int32)
        return dataclasses.replace(
            InputBatch.make_dummy(count, sum(tokens), InputBuffers(8, 64, torch.device("cpu"))),
            num_reqs_after_padding=padded, num_tokens_after_padding=sum(tokens) + padded - count,
            num_scheduled_tokens=np.array(tokens, dtype=np.int32), query_start_loc_np=starts,
            query_start_loc=buffers.query_start_loc[: padded + 1], seq_lens=buffers.seq_lens[:padded],
            seq_lens_cpu_upper_bound=upper, is_prefilling_np=np.array(prefilling),
        )  # fmt: skip

    captured = prepared(InputBatch.make_dummy(4, 4, buffers), CUDAGraphMode.NONE, capture=True)
    assert captured.decode.rows == 4 and captured.prompts is None

    replayed = prepared(scheduled([1, 1, 1], [70, 9, 30], [False, True, False], 4), CUDAGraphMode.FULL)
    assert replayed.decode.rows == 4 and replayed.prompts is None
    assert replayed.decode.seq_lens.tolist() == [70, 9, 30, 0]
    assert replayed.decode.prompts.tolist() == [False, True, False, False]
    for name in ("block_table", "seq_lens", "prompts"):  # what a graph reads is where it was
        assert getattr(replayed.decode, name).data_ptr() == getattr(captured.decode, name).data_ptr(), name

    assert sort_batch_req_ids({"a": 5, "b": 1, "c": 7, "d": 1}, 1) == ["b", "d", "a", "c"]
    mixed = prepared(scheduled([1, 1, 5, 7], [40, 33, 5, 90], [False, True, True, True], 4), CUDAGraphMode.PIECEWISE)
    assert mixed.decode.rows == 2 and mixed.decode.prompts.tolist() == [False, True]
    assert mixed.prompts.query_start_loc.tolist() == [0, 5, 12] and mixed.prompts.seq_lens.tolist() == [5, 90]
    assert torch.equal(mixed.prompts.block_table_tensor, tables[2:4])

    read = prepared(scheduled([4, 9], [4, 30], [True, True], 2), CUDAGraphMode.PIECEWISE)
    assert read.num_actual_tokens == 13 and not isinstance(read, gpu.SplitMetadata)
    print("as expected")
