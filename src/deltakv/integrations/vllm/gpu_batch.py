"""A batch in vLLM's order, rows with one token first. Decided on the host, from what it knows anyway."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from deltakv.errors import UnsupportedUseError


def one_token_rows(common: CommonAttentionMetadata) -> int:
    """How many rows have one token: the first ones. The padding of a captured batch counts.

    They are the rows at a decode step, and those that read the last token of a prompt: vLLM replays the graph of the
    decode step for any batch of them. Raises `UnsupportedUseError` if vLLM has not put them first.
    """
    if common.max_query_len <= 1:
        return common.num_reqs
    lengths = (common.query_start_loc_cpu[1:] - common.query_start_loc_cpu[:-1]).numpy()
    one = lengths == 1
    count = int(one.argmin())
    # A prompt of a single token may stand anywhere: nothing can be left out of it.
    upper = common.seq_lens_cpu_upper_bound
    if upper is None or (upper.numpy()[count : len(one)][one[count:]] > 1).any():
        raise UnsupportedUseError("this vLLM does not put rows with one token before the others")
    return count


def last_of_prompts(common: CommonAttentionMetadata, count: int) -> Tensor:
    """bool [count], on the CPU: of the first `count` rows those that still read their prompt. Padding does not.

    Raises `UnsupportedUseError` if vLLM does not tell.
    """
    told = common.is_prefilling
    if told is None:
        raise UnsupportedUseError("this vLLM does not tell prompts from decode steps (is_prefilling is not set)")
    return torch.nn.functional.pad(told[:count], (0, count - len(told[:count])))


def behind(common: CommonAttentionMetadata, count: int) -> CommonAttentionMetadata:
    """The batch without its first `count` rows, of one token each. Its tokens count from the first one that is left."""
    rows = {
        name: None if value is None else value[count:]
        for name in (
            "seq_lens", "block_table_tensor", "slot_mapping", "is_prefilling", "positions", "seq_lens_cpu_upper_bound",
            "_seq_lens_cpu", "_num_computed_tokens_cpu",
        )
        for value in (getattr(common, name),)
    }  # fmt: skip
    return common.replace(
        **rows,
        query_start_loc=common.query_start_loc[count:] - count,
        query_start_loc_cpu=common.query_start_loc_cpu[count:] - count,
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - count,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
