"""The memory of the paged KV pool: a K and a V tensor for each layer, in pages."""

from __future__ import annotations

import torch
from torch import Tensor

#: Pages that are moved at once.
_MOVE = 256


class KVPool:
    """K and V of each layer, [n_pages, page_size, n_kv_heads, head_dim], made when a layer is first written.

    Layers may differ in heads, dtype and device; page numbers mean the same in all of them. On a CPU the memory of
    pages that nobody has written is not committed by the operating system, so room ahead costs nothing.
    """

    def __init__(self, n_layers: int, page_size: int) -> None:
        self.page_size = page_size
        self.n_pages = 0
        self.k: list[Tensor | None] = [None] * n_layers
        self.v: list[Tensor | None] = [None] * n_layers

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The K and V tensors of a layer that has been written."""
        k, v = self.k[index], self.v[index]
        assert k is not None and v is not None, f"layer {index} has no K and V yet"
        return k, v

    def ensure_layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """As `layer`; makes the tensors first where needed. like: [..., n_kv_heads, tokens, head_dim] new keys."""
        if self.k[index] is None:
            shape = (self.n_pages, self.page_size, like.shape[-3], like.shape[-1])
            self.k[index], self.v[index] = _head_major(shape, like), _head_major(shape, like)
        return self.layer(index)

    def move(self, n_pages: int, source: list[int], target: list[int]) -> None:
        """Moves the pages `source` to the places `target` of a pool of `n_pages`; all others are lost.

        One layer at a time, so only one is held twice.
        """
        for index in range(len(self.k)):
            for tensors in (self.k, self.v):
                old = tensors[index]
                if old is not None:
                    new = _head_major((n_pages, *old.shape[1:]), old)
                    for first in range(0, len(source), _MOVE):  # an indexed copy passes through a buffer of its size
                        some = slice(first, first + _MOVE)
                        new[target[some]] = old[source[some]]
                    tensors[index] = new
        self.n_pages = n_pages

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        """Copies whole pages in every layer."""
        for tensor in [*self.k, *self.v]:
            if tensor is not None:
                tensor[target] = tensor[source]

    def bytes_a_page(self) -> int:
        """Bytes of one page over all layers, K and V."""
        return sum(t.element_size() * t[0].numel() for t in [*self.k, *self.v] if t is not None and len(t))


def _head_major(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty [n_pages, page_size, n_kv_heads, head_dim] whose memory runs head by head.

    Then a row whose pages are neighbours is one unbroken stream for each head, which a CPU reads 12% faster than
    tokens whose heads alternate (the flash kernel over 8,000 tokens, 3 heads of 64, fp32).
    """
    n_pages, page_size, n_kv, dim = shape
    with torch.inference_mode(False):  # a pool made in inference mode could not be written outside of it
        memory = torch.empty((n_kv, n_pages, page_size, dim), dtype=like.dtype, device=like.device)
    return memory.permute(1, 2, 0, 3)
