"""Paged attention in PyTorch, for the CPU: its own flash kernel over views of the pool.

Four facts shape it. The kernel works on [batch, heads, queries, dim], so the query heads of one KV head go in as its
queries: K and V are read once, not once a query head. A row whose pages lie side by side in the pool (the pool
places them so) is one strided view, read in place; rows of one length that lie evenly spaced are one view together.
Scattered pages are first gathered into a buffer that is kept, because the page faults of a fresh one cost four times
the copy. And between two reads of the whole cache every small call is slow, its code and data being cold: so there are
few of them, whatever the batch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Where there are more cores than KV heads, a row is cut into chunks of so many tokens, merged by log-sum-exp.
CHUNK = 512

#: Rows are gathered together up to so many pages.
GATHER_PAGES = 1024

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_local = threading.local()


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A kept buffer; one for each name, made anew when the shape changes."""
    kept: dict[str, Tensor] = _local.__dict__.setdefault("kept", {})
    if name not in kept or kept[name].shape != shape or kept[name].dtype != dtype:
        with torch.inference_mode(False):  # made in inference mode, it could not be written outside of it
            kept[name] = torch.empty(shape, dtype=dtype)
    return kept[name]


def _gather(name: str, heads: Tensor, tables: Tensor) -> Tensor:
    """[rows, n_kv, count * page_size, dim]: the pages that `tables`, int32 [rows, count], names, out of
    `heads`, [n_kv, n_pages, page_size, dim]."""
    n_kv, n_pages, page_size, dim = heads.shape
    rows, count = tables.shape
    out = _buffer(name, (rows, n_kv, count, page_size, dim), heads.dtype)
    if heads.is_contiguous():  # the pages of all heads are one list, each a single copy
        index = tables[:, None] + torch.arange(0, n_kv * n_pages, n_pages, dtype=torch.int32)[:, None]
        torch.index_select(heads.view(n_kv * n_pages, -1), 0, index.flatten(), out=out.view(rows * n_kv * count, -1))
    else:
        for row, table in zip(out, tables, strict=True):  # index_select would copy the pool to make it contiguous
            row.copy_(heads.permute(1, 2, 0, 3)[table.long()].permute(2, 0, 1, 3))
    return out.flatten(2, 3)


def _view(heads: Tensor, first: list[int], tokens: int) -> Tensor:
    """[rows, n_kv, tokens, dim]: the tokens of rows that start at the evenly spaced pages `first`, in place."""
    n_kv, _, _, dim = heads.shape
    of_head, of_page, of_token, _ = heads.stride()
    spacing = first[1] - first[0] if len(first) > 1 else 0
    return heads.as_strided(
        (len(first), n_kv, tokens, dim),
        (spacing * of_page, of_head, of_token, 1),
        heads.storage_offset() + first[0] * of_page,
    )


def _evenly_spaced(rows: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cuts (row, first page) pairs into stretches whose first pages are evenly spaced, in ascending order."""
    stretch: list[tuple[int, int]] = []
    for row in rows:
        spacing = row[1] - stretch[-1][1] if stretch else 0
        first_spacing = stretch[1][1] - stretch[0][1] if len(stretch) > 1 else spacing
        if stretch and (spacing <= 0 or spacing != first_spacing):
            yield stretch
            stretch = []
        stretch.append(row)
    yield stretch


@dataclass(frozen=True)
class _Group:
    """Rows of one length whose K and V are read in one go.

    rows: their numbers. starts: the first page of each, if they are to be read in place; else tables: int32
    [rows, pages], what to gather.
    """

    rows: list[int]
    seq_len: int
    starts: list[int]
    tables: Tensor | None = None


def _groups(table: Tensor, seq_lens: Tensor, page_size: int) -> list[_Group]:
    """All rows that have tokens, in groups. table: int32 [rows, (1,) width]; seq_lens: int32 [rows(, 1)].

    All layers of a step share their tables, so the last answers are kept for as long as the tensors live.
    """
    kept: list[tuple[object, object, object, list[_Group]]] = _local.__dict__.setdefault("groups", [])
    tracked = not (table.is_inference() or seq_lens.is_inference())
    version = (table._version, seq_lens._version, page_size) if tracked else None
    for known_table, known_lens, known_version, groups in kept:
        if known_table() is table and known_lens() is seq_lens and version is not None and known_version == version:  # type: ignore[operator]
            return groups
    flat_table, flat_lens = table.reshape(-1, table.shape[-1]), seq_lens.flatten()
    groups = list(_find_groups(flat_table.numpy(), flat_lens.tolist(), page_size))
    kept.insert(0, (weakref.ref(table), weakref.ref(seq_lens), version, groups))
    del kept[2:]
    return groups


def _find_groups(table: np.ndarray, seq_lens: list[int], page_size: int) -> Iterator[_Group]:
    in_place: dict[int, list[tuple[int, int]]] = {}
    scattered: dict[int, list[int]] = {}
    for row, seq_len in enumerate(seq_lens):
        if seq_len == 0:
            continue
        pages = table[row, : -(-seq_len // page_size)]
        if int(pages[-1]) - int(pages[0]) == len(pages) - 1 and (np.diff(pages) == 1).all():
            in_place.setdefault(seq_len, []).append((row, int(pages[0])))
        else:
            scattered.setdefault(seq_len, []).append(row)
    for seq_len, placed in in_place.items():
        for stretch in _evenly_spaced(placed):
            yield _Group([row for row, _ in stretch], seq_len, [first for _, first in stretch])
    for seq_len, rows in scattered.items():
        count = -(-seq_len // page_size)
        step = max(1, GATHER_PAGES // count)
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step]
            yield _Group(chosen, seq_len, [], torch.from_numpy(table[chosen, :count]))


def _kv(group: _Group, k_heads: Tensor, v_heads: Tensor) -> tuple[Tensor, Tensor]:
    """The group's K and V, [rows, n_kv, seq_len, dim]. Gathered ones lie in kept buffers: use them before the next.

    k_heads, v_heads: [n_kv, n_pages, page_size, dim].
    """
    page_size = k_heads.shape[2]
    tables = group.tables
    if tables is None and all(x.stride(1) == page_size * x.stride(2) and x.stride(3) == 1 for x in (k_heads, v_heads)):
        return _view(k_heads, group.starts, group.seq_len), _view(v_heads, group.starts, group.seq_len)
    if tables is None:  # the pool's layout has gaps, so that not even neighbouring pages are one view
        count = -(-group.seq_len // page_size)
        tables = torch.tensor(group.starts, dtype=torch.int32)[:, None] + torch.arange(count, dtype=torch.int32)
    k, v = _gather("k", k_heads, tables), _gather("v", v_heads, tables)
    return k[:, :, : group.seq_len], v[:, :, : group.seq_len]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [rows, n_kv, heads a KV head, dim] over K and V: out of the same shape, lse fp32 without the dim."""
    (n_kv, tokens), threads = k.shape[1:3], torch.get_num_threads()
    if threads == 1:
        out, lse = _flash(q, k, v, scale=scale)
        return out, lse
    # A row at a time. Which thread takes a head would follow from the batch, and bits from the thread, whose buffer may
    # begin anywhere; and with heads to spare the kernel would cut rows by what the batch leaves.
    if n_kv >= threads or tokens < 2 * CHUNK:
        alone = [_flash(*(x[row : row + 1] for x in (q, k, v)), scale=scale) for row in range(len(q))]
        return torch.cat([out for out, _ in alone]), torch.cat([lse for _, lse in alone])
    whole = tokens // CHUNK
    outs, lses = [], []
    for row in range(len(q)):
        k_cut, v_cut = (x[row, :, : whole * CHUNK].unflatten(1, (whole, CHUNK)).transpose(0, 1) for x in (k, v))
        parts = [_flash(q[row].expand(whole, -1, -1, -1), k_cut, v_cut, scale=scale)]
        if rest := tokens - whole * CHUNK:
            parts.append(
                _flash(q[row : row + 1], k[row : row + 1, :, -rest:], v[row : row + 1, :, -rest:], scale=scale)
            )
        part_lses = torch.cat([part[1] for part in parts])
        weights = torch.softmax(part_lses, dim=0)
        outs.append((torch.cat([part[0] for part in parts]).float() * weights[..., None]).sum(0))
        lses.append(torch.logsumexp(part_lses, dim=0))
    return torch.stack(outs), torch.stack(lses)


def _split(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each head group its number, its queries [rows, n_kv, heads a KV head, dim], and its K and V heads first."""
    groups = table.shape[1]
    n_kv = k_cache.shape[2] // groups
    queries = q.view(len(q), groups, n_kv, q.shape[1] // k_cache.shape[2], q.shape[2])
    k_heads, v_heads = k_cache.permute(2, 0, 1, 3), v_cache.permute(2, 0, 1, 3)
    for g in range(groups):
        heads = slice(g * n_kv, (g + 1) * n_kv)
        yield g, queries[:, g], k_heads[heads], v_heads[heads]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `naive.decode_attention`."""
    rows, n_heads, dim = q.shape
    out: Tensor | None = None
    for g, queries, k_heads, v_heads in _split(q.contiguous(), k_cache, v_cache, block_table):
        for group in _groups(*_columns(block_table, seq_lens, g), k_cache.shape[1]):
            all_rows = len(group.rows) == rows
            chosen = queries if all_rows else queries[group.rows]
            attended, lse = _attend(chosen, *_kv(group, k_heads, v_heads), scale)
            if sinks is not None:
                learned = sinks.float().view(block_table.shape[1], *queries.shape[1:3])[g]
                attended = attended * torch.sigmoid(lse - learned)[..., None]
            if all_rows and block_table.shape[1] == 1:
                return attended.to(q.dtype).reshape(rows, n_heads, dim)
            if out is None:
                out = torch.zeros((rows, block_table.shape[1], *queries.shape[1:]), dtype=q.dtype)
            out[group.rows, g] = attended.to(q.dtype)
    return torch.zeros_like(q) if out is None else out.view(rows, n_heads, dim)


def _columns(block_table: Tensor, seq_lens: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Table and lengths of one head group. With one group, the tensors themselves: `_groups` knows them again."""
    if block_table.shape[1] == 1:
        return block_table, seq_lens
    return block_table[:, g], seq_lens[:, g]


def decode_attention_stats(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `naive.decode_attention_stats`. K is read once for the logits and V once for the output."""
    rows, n_heads, dim = q.shape
    page_size, n_kv = k_cache.shape[1:3]
    groups, width = block_table.shape[1:]
    kv_heads, shared = n_kv // groups, n_heads // n_kv
    out = torch.zeros((rows, groups, kv_heads, shared, dim), dtype=q.dtype)
    logits = torch.full((rows, groups, kv_heads, shared, width * page_size), float("-inf"))
    lse = torch.full((rows, groups, kv_heads, shared, 1), float("-inf"))
    if sinks is not None:
        sinks = sinks.float().view(groups, kv_heads, shared, 1)
        lse.copy_(sinks.expand_as(lse))
    for g, queries, k_heads, v_heads in _split(q.float() * scale, k_cache, v_cache, block_table):
        for group in _groups(*_columns(block_table, seq_lens, g), page_size):
            k, v = _kv(group, k_heads, v_heads)
            # The weights live in a tensor of their own, so that a row's arithmetic never sees the table's width; and
            # each product is of one row, because a product of several rows at once rounds differently.
            weights = torch.empty((len(group.rows), kv_heads, shared, group.seq_len))
            for i, row in enumerate(group.rows):
                torch.bmm(queries[row], k[i].float().transpose(1, 2), out=weights[i])
            logits[group.rows, g, ..., : group.seq_len] = weights
            top = weights.amax(-1, keepdim=True)
            if sinks is not None:
                top = torch.maximum(top, sinks[g])
            weights = weights.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            if sinks is not None:
                total += torch.exp(sinks[g] - top)
            attended = torch.empty((len(group.rows), kv_heads, shared, dim))
            for i in range(len(group.rows)):
                torch.bmm(weights[i], v[i].float(), out=attended[i])
            out[group.rows, g] = (attended / total).to(q.dtype)
            lse[group.rows, g] = top + total.log()
    logits, lse = logits.view(rows, 1, n_heads, width * page_size), lse.view(rows, n_heads)
    return out.view(q.shape), logits, torch.zeros_like(lse)[:, None], lse
