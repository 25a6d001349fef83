"""store_kv against plain assignment, slot by slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_inputs import make_caches
from torch import Tensor

from deltakv import ops
from deltakv.ops.store_kv.naive import store_kv as naive_store

Op = Callable[..., Any]
OPS = [pytest.param(ops.store_kv, id="vectorised"), pytest.param(naive_store, id="naive")]


def new_tokens(tokens: int, n_kv: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, n_kv, head_dim, generator=generator).to(dtype)
    return k, v


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["plain", "interleaved", "heads_first", "heads_outermost"])
@pytest.mark.parametrize("page_size, n_kv, head_dim", [(16, 2, 16), (32, 1, 64), (64, 4, 80), (128, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 17, 90])
def test_only_the_named_slots_are_written(
    op: Op, layout: str, page_size: int, n_kv: int, head_dim: int, dtype: torch.dtype, tokens: int
) -> None:
    n_pages = 7
    k_cache, v_cache = make_caches(n_pages, page_size, n_kv, head_dim, dtype, layout)
    k, v = new_tokens(tokens, n_kv, head_dim, dtype, seed=tokens)
    slots = torch.randperm(n_pages * page_size, generator=torch.Generator().manual_seed(1))[:tokens]
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots.tolist()):
        want_k[slot // page_size, slot % page_size] = k[token]
        want_v[slot // page_size, slot % page_size] = v[token]
    strides, addresses = (k_cache.stride(), v_cache.stride()), (k_cache.data_ptr(), v_cache.data_ptr())
    assert op(k_cache, v_cache, k, v, slots // page_size, slots % page_size) is None
    assert same(k_cache, want_k) and same(v_cache, want_v)
    assert (k_cache.stride(), v_cache.stride()) == strides
    assert (k_cache.data_ptr(), v_cache.data_ptr()) == addresses


@pytest.mark.parametrize("op", OPS)
def test_tokens_as_transformers_gives_them(op: Op) -> None:
    """K as a view of [n_kv, tokens, dim] and V as a view of a fused projection."""
    k, v = new_tokens(33, 2, 16, torch.float32)
    strided_k = k.transpose(0, 1).contiguous().transpose(0, 1)
    strided_v = torch.cat([v, k], dim=-1)[..., :16]
    assert not strided_k.is_contiguous() and not strided_v.is_contiguous()
    slots = torch.arange(20, 53)
    plain, strided = make_caches(5, 16, 2, 16, k.dtype, "plain"), make_caches(5, 16, 2, 16, k.dtype, "plain")
    op(*plain, k, v, slots // 16, slots % 16)
    op(*strided, strided_k, strided_v, slots // 16, slots % 16)
    assert same(plain[0], strided[0]) and same(plain[1], strided[1])
    assert torch.equal(plain[0].flatten(0, 1)[20:53], k) and torch.equal(plain[1].flatten(0, 1)[20:53], v)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["plain", "interleaved", "heads_first", "heads_outermost"])
def test_storing_twice_keeps_the_later(op: Op, layout: str) -> None:
    k_cache, v_cache = make_caches(3, 16, 2, 16, torch.float32, layout)
    first, second = new_tokens(48, 2, 16, torch.float32, 1), new_tokens(5, 2, 16, torch.float32, 2)
    op(k_cache, v_cache, *first, torch.arange(48) // 16, torch.arange(48) % 16)
    op(k_cache, v_cache, *second, torch.tensor([2, 0, 1, 0, 1]), torch.tensor([15, 0, 0, 15, 15]))
    for cache, old, new in ((k_cache, first[0], second[0]), (v_cache, first[1], second[1])):
        want = old.clone()
        want[[47, 0, 16, 15, 31]] = new
        assert torch.equal(cache.reshape(48, 2, 16), want)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op: Op) -> None:
    k_cache, v_cache = make_caches(2, 16, 2, 16, torch.float32, "plain")
    op(k_cache, v_cache, *new_tokens(0, 2, 16, torch.float32), *torch.empty((2, 0), dtype=torch.int64))
    assert k_cache.isnan().all() and v_cache.isnan().all()


@pytest.mark.parametrize("layout", ["plain", "heads_outermost"])
def test_compiled_it_writes_in_place(layout: str) -> None:
    """A compiler sees through it, and does not make a second pool on the way."""
    compiled = torch.compile(ops.store_kv, fullgraph=True, backend="aot_eager")
    caches, twins = (make_caches(3, 16, 2, 16, torch.float32, layout) for _ in range(2))
    new, places = new_tokens(4, 2, 16, torch.float32), (torch.tensor([0, 2, 1, 0]), torch.tensor([3, 8, 0, 15]))
    addresses = [cache.data_ptr() for cache in caches]
    compiled(*caches, *new, *places)
    ops.store_kv(*twins, *new, *places)
    assert [cache.data_ptr() for cache in caches] == addresses
    assert same(caches[0], twins[0]) and same(caches[1], twins[1])
