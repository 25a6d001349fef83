"""Records: what goes in comes out, exactly or within half a scale, whatever the dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deltakv
from deltakv.offload.codecs import ALIGN, InputCodec, codec
from deltakv.offload.scheduler import LayerShape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(dtype)


def through_bytes(records: Tensor) -> Tensor:
    """As if they had crossed the bus: the bytes alone, in memory of their own."""
    return torch.from_numpy(records.numpy().copy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (1, 3), (2, 128)])
def test_plain_is_exact(dtype: torch.dtype, heads: int, dim: int) -> None:
    k, v = (values(5, 3, heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    kept = codec(heads, dim, dtype, 16)
    records = kept.encode(k, v)
    assert records.shape == (5, 3, kept.record) and records.dtype == torch.uint8 and kept.record % ALIGN == 0
    for ours, original in zip(kept.decode(through_bytes(records)), (k, v), strict=True):
        assert torch.equal(ours, original)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (2, 128), (1, 80)])
def test_quantised_is_within_half_a_scale(dtype: torch.dtype, bits: int, heads: int, dim: int) -> None:
    k, v = (values(5, 3, heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    kept = codec(heads, dim, dtype, bits)
    group = 64 if dim % 64 == 0 else dim
    for ours, original in zip(kept.decode(through_bytes(kept.encode(k, v))), (k, v), strict=True):
        assert ours.shape == original.shape and ours.dtype == dtype
        groups = original.float().unflatten(-1, (-1, group))
        spread = groups.amax(-1) - groups.amin(-1)
        bound = spread / ((1 << bits) - 1) / 2 + 6 * torch.finfo(dtype).eps * groups.abs().amax(-1)
        error = (ours.float() - original.float()).unflatten(-1, (-1, group)).abs().amax(-1)
        assert (error <= bound).all()
        assert (error > spread / (1 << bits) / 8).any(), "no error at all: nothing was quantised"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_of_equal_values_comes_back(bits: int) -> None:
    k = torch.full((2, 1, 1, 64), -7.5)
    kept = codec(1, 64, torch.float32, bits)
    ours, _ = kept.decode(kept.encode(k, k))
    assert torch.equal(ours, k)


def test_eight_bits_take_little_more_than_half() -> None:
    sizes = {bits: codec(4, 128, torch.float16, bits).record for bits in (16, 8, 4)}
    assert sizes[16] / sizes[8] > 1.85
    assert sizes[16] / sizes[4] > 3.4


def test_odd_heads_cannot_share_bytes() -> None:
    with pytest.raises(deltakv.ConfigError, match="head_dim=7 is odd"):
        codec(2, 7, torch.float32, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 5])
def test_inputs_and_positions(dtype: torch.dtype, hidden: int) -> None:
    x, positions = values(4, 3, hidden, dtype=dtype), torch.arange(12).view(4, 3) * 100_003
    kept = InputCodec(hidden, dtype)
    records = kept.encode(x, positions)
    assert records.shape == (4, 3, kept.record)
    ours, where = kept.decode(through_bytes(records))
    assert torch.equal(ours, x) and torch.equal(where, positions)


def test_what_the_scheduler_counts_is_what_is_stored() -> None:
    """alpha and kappa of ordinary widths, but for the position."""
    shape = LayerShape(hidden=4096, kv_heads=32, head_dim=128, element_bytes=2)
    assert codec(32, 128, torch.float16, 16).record == shape.kappa
    assert InputCodec(4096, torch.float16).record == shape.alpha + ALIGN
