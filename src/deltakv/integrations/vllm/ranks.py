"""Picks under tensor parallelism: one pick for all ranks, by the heads of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from deltakv.errors import UnsupportedUseError
from deltakv.methods.base import PagesOf

NO_NCCL = (
    'tp_selection="global" needs vLLM\'s NCCL communicator, which is off here; leave VLLM_DISABLE_PYNCCL unset, or '
    'give tp_selection="local"'
)


def across_ranks(tp_selection: str) -> Callable[[Tensor, PagesOf], Tensor] | None:
    """How the query heads of other ranks have a say in a pick; None if there are none, or each rank picks alone."""
    return pages_over_ranks if tp_selection == "global" and get_tp_group().world_size > 1 else None


def pages_over_ranks(tokens: Tensor, pages_of: PagesOf) -> Tensor:
    """fp32 [rows, pages], the same on every rank: `pages_of` the largest value of each token over the ranks' heads.

    tokens: fp32 [rows, tokens], by the heads of this rank; it may be overwritten. vLLM's own collectives of a group
    only sum. On a GPU its NCCL communicator is asked directly: it runs inside a captured graph, on the stream of the
    step. Raises `UnsupportedUseError` if that is off.
    """
    group = get_tp_group()
    if not tokens.is_cuda:
        torch.distributed.all_reduce(tokens, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
        return pages_of(tokens)
    nccl = group.device_communicator.pynccl_comm
    if nccl is None or nccl.disabled:
        raise UnsupportedUseError(NO_NCCL)
    return in_shares(nccl, group.world_size, tokens, pages_of)


def in_shares(nccl: Any, ranks: int, tokens: Tensor, pages_of: PagesOf) -> Tensor:
    """`pages_over_ranks`, each rank for a share of the rows, which it then hands to all: tokens cross once, and are
    many; pages are few. If every rank were given all tokens, twice as much would cross."""
    rows, width = tokens.shape
    share = -(-rows // ranks)
    if rows < share * ranks:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, share * ranks - rows))
    mine = tokens.new_empty((share, width))
    nccl.reduce_scatter(mine, tokens, op=torch.distributed.ReduceOp.MAX)
    pages = pages_of(mine)
    everyones = pages.new_empty((share * ranks, pages.shape[1]))
    nccl.all_gather(everyones, pages)
    return everyones[:rows]
