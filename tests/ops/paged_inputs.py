"""Random paged inputs for the op tests, with the plain keys and values that they were made of."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Lengths around the edges of pages of 16 to 128 tokens, some long ones, and an empty row.
LENGTHS = (
    1,
    15,
    16,
    17,
    0,
    31,
    32,
    33,
    47,
    63,
    64,
    65,
    100,
    127,
    128,
    129,
    255,
    257,
    500,
    1000,
    1023,
    1024,
    1025,
)

#: Rows long enough for any cutting into chunks, with short ones beside them.
LONG = (5000, 17, 2049, 0, 3000, 4096, 300, 2100)

#: Several rows of one length, not all of them neighbours.
EQUAL = (300, 300, 300, 300, 17, 64, 64, 64, 300, 300, 1000, 1000)


@dataclass
class Paged:
    """Arguments of `decode_attention`, and their origin.

    keys, values: keys[row][group] is [seq_len, n_kv_heads / groups, head_dim], what the row's group holds.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    scale: float
    sinks: Tensor | None
    keys: list[list[Tensor]]
    values: list[list[Tensor]]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None]:
        return (
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.seq_lens,
            self.scale,
            self.sinks,
        )

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None]:
        """The arguments of these rows alone, in this order, on the same pool."""
        at = torch.tensor(list(rows), dtype=torch.long)
        return (
            self.q[at],
            self.k_cache,
            self.v_cache,
            self.block_table[at],
            self.seq_lens[at],
            self.scale,
            self.sinks,
        )


def make_caches(
    n_pages: int, page_size: int, n_kv: int, head_dim: int, dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor]:
    """Two pools [n_pages, page_size, n_kv, head_dim] full of NaN.

    layout: "plain"; "interleaved", K and V of a token side by side; "heads_first", a page's heads one after the
        other; "heads_outermost", a head's pages one after the other.
    """
    nan = float("nan")
    if layout == "interleaved":
        pool = torch.full((n_pages, page_size, n_kv, 2 * head_dim), nan, dtype=dtype)
        return pool[..., :head_dim], pool[..., head_dim:]
    if layout == "heads_first":
        pool = torch.full((2, n_pages, n_kv, page_size, head_dim), nan, dtype=dtype)
        return pool[0].transpose(1, 2), pool[1].transpose(1, 2)
    if layout == "heads_outermost":
        pool = torch.full((2, n_kv, n_pages, page_size, head_dim), nan, dtype=dtype)
        return pool[0].permute(1, 2, 0, 3), pool[1].permute(1, 2, 0, 3)
    assert layout == "plain"
    shape = (n_pages, page_size, n_kv, head_dim)
    return torch.full(shape, nan, dtype=dtype), torch.full(shape, nan, dtype=dtype)


def absolute(logits: Tensor, peaks: Tensor) -> Tensor:
    """The logits of `decode_attention_stats` as [rows, n_heads, tokens], their tiles' peaks added."""
    return (logits.float() + peaks[..., None]).transpose(1, 2).flatten(2)


def make_paged(
    lengths: Sequence[int] | Sequence[Sequence[int]],
    *,
    n_heads: int = 4,
    n_kv: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    groups: int = 1,
    layout: str = "plain",
    table: str = "permuted",
    extra_width: int = 3,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 2.0,
    seed: int = 0,
) -> Paged:
    """A ragged batch; `lengths` has one entry a row, or one a row and group.

    table: "contiguous" (row after row, in order), "halves" (a row's second half lies before its first),
        "permuted" (pages all over the pool), or "shared" (permuted, and a row's first full pages are those of
        the row before it, for every second row). The contents do not depend on it, but for "shared".
    extra_width: columns of the table beyond the longest row.
    Everything that no row may read is NaN: free pages, slots behind a row's last token, and in a group's
    pages the KV heads of the other groups. Table entries behind a row's last page are random, but lie in the
    pool.
    """
    generator = torch.Generator().manual_seed(seed)
    chooser = random.Random(seed)
    ragged = [[n] * groups if isinstance(n, int) else list(n) for n in lengths]
    rows, heads = len(ragged), n_kv // groups
    counts = [[math.ceil(n / page_size) for n in row] for row in ragged]
    width = max(max(row) for row in counts) + extra_width
    n_pages = sum(map(sum, counts)) + 5
    free = list(range(n_pages))
    free.reverse()
    if table in ("permuted", "shared"):
        chooser.shuffle(free)

    k_cache, v_cache = make_caches(n_pages, page_size, n_kv, head_dim, dtype, layout)
    block_table = torch.tensor(
        [[[chooser.randrange(n_pages) for _ in range(width)] for _ in range(groups)] for _ in range(rows)],
        dtype=torch.int32,
    )
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    for row in range(rows):
        keys.append([])
        values.append([])
        for group in range(groups):
            length = ragged[row][group]
            k = torch.randn(length, heads, head_dim, generator=generator).to(dtype)
            v = torch.randn(length, heads, head_dim, generator=generator).to(dtype)
            shared = 0
            if table == "shared" and row % 2:
                shared = min(length, ragged[row - 1][group]) // page_size
                k[: shared * page_size] = keys[row - 1][group][: shared * page_size]
                v[: shared * page_size] = values[row - 1][group][: shared * page_size]
            mine = slice(group * heads, (group + 1) * heads)
            block_table[row, group, :shared] = block_table[row - 1, group, :shared]
            owned = [free.pop() for _ in range(shared, counts[row][group])]
            if table == "halves":
                owned = owned[len(owned) // 2 :] + owned[: len(owned) // 2]
            for logical, physical in enumerate(owned, start=shared):
                block_table[row, group, logical] = physical
                part = slice(logical * page_size, min((logical + 1) * page_size, length))
                k_cache[physical, : part.stop - part.start, mine] = k[part]
                v_cache[physical, : part.stop - part.start, mine] = v[part]
            keys[-1].append(k)
            values[-1].append(v)
    return Paged(
        q=(torch.randn(rows, n_heads, head_dim, generator=generator) * sharpness).to(dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        seq_lens=torch.tensor(ragged, dtype=torch.int32),
        scale=head_dim**-0.5,
        sinks=(torch.randn(n_heads, generator=generator) + 1).to(dtype) if sinks else None,
        keys=keys,
        values=values,
    )
