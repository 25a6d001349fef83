"""How long one layer's attention takes at a decode step, by its role: measured with this package's ops on a device.

A plan's time is the sum over its layers. What a plan does not change (projections, MLP, LM head) is left out: it is the
same under every plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from deltakv.bench.clock import COPY_BYTES
from deltakv.bench.op import Shape, make_pools, time_round
from deltakv.config import Delta
from deltakv.methods import SoftmaxStats, selector
from deltakv.ops import decode_attention, decode_attention_stats

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds for a whole batch, each as (tokens of a row, ms), tokens ascending.

    full: attends to rows of so many tokens. select: likewise, scores their pages and picks. reuse: attends to a pick of
    so many. Between two points along a straight line; outside of them as at the nearest.
    """

    full: Points
    select: Points
    reuse: Points

    @classmethod
    def of(cls, full: dict[int, float], select: dict[int, float], reuse: dict[int, float]) -> LayerTimes:
        """Of what a clock said. More to read never takes less here, and to pick is more than to attend: where the clock
        says otherwise, it is noise."""
        picked = {tokens: max(select[tokens], full[tokens]) for tokens in select}
        return cls(_rising(full), _rising(picked), _rising(reuse))

    @classmethod
    def load(cls, numbers: dict[str, Any]) -> LayerTimes:
        """From `numbers`."""
        return cls(**{role: tuple((int(tokens), float(ms)) for tokens, ms in numbers[role]) for role in numbers})

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def step(self, full: int, select: int, reuse: int, length: int, budget: int) -> float:
        """Milliseconds of all attention of a step. full, select, reuse: how many layers; length: tokens of a row;
        budget: of a pick."""
        return full * _at(self.full, length) + select * _at(self.select, length) + reuse * _at(self.reuse, budget)


def measure_layer_times(
    shape: Shape,
    method: Delta,
    lengths: Sequence[int],
    runs: int = 9,
    warmup: int = 2,
    advance: Callable[[int], None] = lambda count: None,
) -> LayerTimes:
    """Medians on `shape.device`. lengths: tokens of a row that are attended to in full; `shape.context` is the longest.

    Nothing is found in the device's caches: in a model's step the weights come between two layers' K and V. advance:
    told of each point, of which there are 2 * len(lengths) + len(pick_sizes(...)).
    """
    size, device = method.page_size, shape.device
    pools = make_pools(shape, size)
    width = -(-shape.context // size)
    scale = shape.head_dim**-0.5
    q = torch.randn(shape.batch, shape.n_heads, shape.head_dim, dtype=shape.dtype, device=device)
    table = torch.arange(shape.batch * width, dtype=torch.int32, device=device).view(shape.batch, 1, width)
    other = torch.zeros(COPY_BYTES["cpu"], dtype=torch.uint8, device=device)
    picks = selector(method)

    def clock(run: Callable[[Any], Any]) -> float:
        advance(1)
        return time_round(run, pools, device, runs, warmup, before=lambda: other.add_(1)).median

    def rows(tokens: int) -> Tensor:
        return torch.full((shape.batch, 1), tokens, dtype=torch.int32, device=device)

    full, select, reuse = {}, {}, {}
    for length in lengths:
        own, lens = table[..., : -(-length // size)].contiguous(), rows(length)

        def attend(kv: Any, own: Tensor = own, lens: Tensor = lens) -> Any:
            return decode_attention(q, *kv, own, lens, scale)

        def pick(kv: Any, own: Tensor = own, lens: Tensor = lens) -> Any:
            _, logits, peaks, lse = decode_attention_stats(q, *kv, own, lens, scale)
            pages = picks.pick(SoftmaxStats(logits, peaks, lse, lens[:, 0], size)).pages
            return own[:, 0].gather(1, pages.long())

        full[length], select[length] = clock(attend), clock(pick)
    for tokens in pick_sizes(min(lengths), size):
        scattered = torch.randperm(width, device=device)[: tokens // size].sort().values
        some, kept = table[..., scattered].contiguous(), rows(tokens)

        def attend_picked(kv: Any, some: Tensor = some, kept: Tensor = kept) -> Any:
            return decode_attention(q, *kv, some, kept, scale)

        reuse[tokens] = clock(attend_picked)
    return LayerTimes.of(full, select, reuse)


def pick_sizes(length: int, page_size: int) -> list[int]:
    """Picks that are measured for rows of `length` tokens: two and three pages, doubled as often as they fit, and all
    whole pages of the row."""
    whole = length // page_size
    doubled = (pages << times for times in range(whole.bit_length()) for pages in (2, 3))
    return [pages * page_size for pages in sorted({*(pages for pages in doubled if pages < whole), whole})]


def _rising(measured: dict[int, float]) -> Points:
    ascending = sorted(measured)
    return tuple(zip(ascending, accumulate((measured[tokens] for tokens in ascending), max), strict=True))


def _at(points: Points, tokens: int) -> float:
    if tokens <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in pairwise(points):
        if tokens <= high:
            return before + (after - before) * (tokens - low) / (high - low)
    return points[-1][1]
