"""Which rows of a batch are at a decode step, and which of these a REUSE or WINDOW layer reads in part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from deltakv.config import Method
from deltakv.errors import UnsupportedUseError
from deltakv.methods import Picks


@dataclass(frozen=True)
class Rows:
    """Rows that a method makes sparse in this step.

    rows: int64 [n], their indices in the batch; queries: int64 [n], where their one query token stands.
    block_table: int32 [n, width]; seq_lens: int32 [n], the current token included.
    """

    rows: Tensor
    queries: Tensor
    block_table: Tensor
    seq_lens: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def decode_rows(common: CommonAttentionMetadata) -> Tensor:
    """bool [rows], on the CPU: rows with one token that is not of their prompt.

    A prompt's last chunk may be one token long; vLLM tells which rows still read their prompt.
    """
    if common.is_prefilling is None:
        raise UnsupportedUseError("this vLLM does not tell prompts from decode steps (is_prefilling is not set)")
    lengths = common.query_start_loc_cpu[1:] - common.query_start_loc_cpu[:-1]
    return (lengths == 1) & ~common.is_prefilling[: len(lengths)].cpu()


def sparse_rows(common: CommonAttentionMetadata, decode: Tensor, method: Method) -> Rows:
    """The decode rows of which a REUSE or WINDOW layer leaves pages out: the others keep them all, and need no pick.

    decode: as `decode_rows` gives it. For batches whose lengths are on the CPU.
    """
    chosen = [
        row
        for row, length in enumerate(common.seq_lens.tolist())
        if decode[row] and method.kept_pages(length) < -(-length // method.page_size)
    ]
    at = torch.tensor(chosen, dtype=torch.int64)
    return Rows(at, common.query_start_loc[at].long(), common.block_table_tensor[at], common.seq_lens[at])


def narrowed(block_table: Tensor, seq_lens: Tensor, picks: Picks, page_size: int) -> tuple[Tensor, Tensor]:
    """A pick as a block table: only the last of a row's kept pages, the current token's, may be partly filled.

    block_table: int32 [n, width]; seq_lens: int32 [n]. Returns the physical pages, int32 [n, kept], and the tokens on
    them, int32 [n].
    """
    free = seq_lens % -page_size  # slots of the last page, as a negative number
    return block_table.gather(1, picks.pages.long()), torch.add(free, picks.n_kept, alpha=page_size)
