"""Picks under tensor parallelism: one pick for all ranks, by the heads of all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from deltakv.errors import UnsupportedUseError


def across_ranks(tp_selection: str) -> Callable[[Tensor], Tensor] | None:
    """How the query heads of other ranks have a say in a pick; None if there are none, or each rank picks alone."""
    return max_over_ranks if tp_selection == "global" and get_tp_group().world_size > 1 else None


def max_over_ranks(token_scores: Tensor) -> Tensor:
    """The largest score of each token over the ranks' heads, in place: fp32 [rows, tokens], the same on every rank.

    vLLM's own `all_reduce` of a group only sums. On a GPU its NCCL communicator is asked directly: it runs inside a
    captured graph, on the stream of the step.
    """
    if token_scores.is_cuda:
        nccl = get_tp_group().device_communicator.pynccl_comm
        if nccl is None or nccl.disabled:
            raise UnsupportedUseError(
                'tp_selection="global" needs vLLM\'s NCCL communicator, which is off here; leave VLLM_DISABLE_PYNCCL '
                'unset, or give tp_selection="local"'
            )
        nccl.all_reduce(token_scores, token_scores, op=torch.distributed.ReduceOp.MAX)
        return token_scores
    torch.distributed.all_reduce(token_scores, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    return token_scores
