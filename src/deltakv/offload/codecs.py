"""What a record holds: K and V as they are or quantised by group, or X with its positions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deltakv.errors import ConfigError

#: Records begin at multiples of this, so that every view into one is aligned and copies are fast.
ALIGN = 16
#: Elements of a head that share a scale and a least value.
GROUP = 64


class Codec(Protocol):
    """K and V of a token and row, to bytes and back. record: bytes, a multiple of `ALIGN`."""

    record: int

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """k, v: [tokens, rows, kv_heads, head_dim]. Returns uint8 [tokens, rows, record]."""
        ...

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse; may be views of `records`."""
        ...


class PlainCodec:
    """K and V as they are: [K of all heads | V of all heads]."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._heads, self._dim, self._dtype = kv_heads, head_dim, dtype
        self.record = aligned(2 * kv_heads * head_dim * dtype.itemsize)

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        return _padded(torch.stack([k, v], dim=2).flatten(2).view(torch.uint8), self.record)

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        width = self._heads * self._dim * self._dtype.itemsize
        k, v = (records[..., at : at + width].view(self._dtype) for at in (0, width))
        return k.unflatten(-1, (self._heads, self._dim)), v.unflatten(-1, (self._heads, self._dim))


class GroupedCodec:
    """K and V in 8 or 4 bits: of each group of a head's elements a scale and the least value, in the model's dtype,
    and a whole number an element, rounded to the nearest: value = least + scale * number.

    K is stored as attention reads it, with RoPE. Without calibration, so the error is half a scale at most.
    """

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, bits: int) -> None:
        self._heads, self._dim, self._dtype, self._bits = kv_heads, head_dim, dtype, bits
        self._group = GROUP if head_dim % GROUP == 0 else head_dim
        if self._group % 2:
            raise ConfigError(f"head_dim={head_dim} is odd, and two 4-bit numbers share a byte; use bits=8 or 16")
        groups = 2 * kv_heads * head_dim // self._group
        self._codes = 2 * kv_heads * head_dim * bits // 8
        self._scales = aligned(self._codes)
        self._end = self._scales + 2 * groups * dtype.itemsize
        self.record = aligned(self._end)

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        values = torch.stack([k, v], dim=2).flatten(2).unflatten(-1, (-1, self._group))  # [tokens, rows, groups, group]
        least, most = values.amin(-1).float(), values.amax(-1).float()
        top = (1 << self._bits) - 1
        # Numbers are taken against what `decode` will multiply by and add, which the dtype has rounded.
        least = least.to(self._dtype)
        scale = ((most - least.float()) / top).clamp_min(torch.finfo(self._dtype).tiny).to(self._dtype)
        numbers = ((values.float() - least.float()[..., None]) / scale.float()[..., None]).round().clamp(0, top)
        codes = numbers.to(torch.uint8).flatten(2)
        if self._bits == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        scales = torch.cat([scale, least], dim=-1).contiguous().view(torch.uint8)
        return _padded(torch.cat([_padded(codes, self._scales), scales], dim=-1), self.record)

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = records[..., : self._codes], records[..., self._scales : self._end].view(self._dtype)
        if self._bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        scale, least = scales.chunk(2, dim=-1)
        numbers = codes.unflatten(-1, (-1, self._group)).to(self._dtype)
        values = torch.addcmul(least[..., None], numbers, scale[..., None]).flatten(2)
        k, v = values.unflatten(-1, (2, self._heads, self._dim)).unbind(2)
        return k, v


class InputCodec:
    """X, what the K and V projections read, and the position that K was rotated at."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        self._hidden, self._dtype = hidden, dtype
        self._at = aligned(hidden * dtype.itemsize)
        self.record = self._at + ALIGN

    def encode(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [tokens, rows, hidden]; positions: int64 [tokens, rows]. Returns uint8 [tokens, rows, record]."""
        where = positions[..., None].to(torch.int32).contiguous().view(torch.uint8)
        parts = [_padded(x.contiguous().view(torch.uint8), self._at), _padded(where, ALIGN)]
        return torch.cat(parts, dim=-1)

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse: x is a view, positions int64."""
        x = records[..., : self._hidden * self._dtype.itemsize].view(self._dtype)
        return x, records[..., self._at : self._at + 4].view(torch.int32)[..., 0].long()


def codec(kv_heads: int, head_dim: int, dtype: torch.dtype, bits: int) -> Codec:
    """The codec for K and V of these heads. bits: 16 for as they are, 8, 4."""
    if bits == 16:
        return PlainCodec(kv_heads, head_dim, dtype)
    return GroupedCodec(kv_heads, head_dim, dtype, bits)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _padded(records: Tensor, width: int) -> Tensor:
    """With zeros at the end of each record."""
    return torch.nn.functional.pad(records, (0, width - records.shape[-1])) if records.shape[-1] < width else records
