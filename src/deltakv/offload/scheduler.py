"""How many tokens to recompute, and what that costs: pure arithmetic on measured rates (KVPR, arXiv 2411.17089).

A decode step needs K and V of all s tokens of b rows in each layer. They lie in host memory. Of the first l tokens
only the layer inputs X cross the bus, and the GPU makes K and V of them again; of the others K and V cross. For one
layer, with alpha bytes of X a token, kappa bytes of K and V, phi FLOP to recompute a token, a bus of P bytes/s, a GPU
of F FLOP/s that needs t_gpu seconds for the rest of the layer:

    serial (the paper's)    t(l) = b*l*alpha/P + max(b*l*phi/F, b*(s-l)*kappa/P)
    pipelined               t(l) = max(b*(l*alpha + (s-l)*kappa)/P, t_gpu + b*l*phi/F)

Attention over what was recomputed goes with its recomputation in the first one (`Rates.attention`), and is a part of
t_gpu in the other. The serial schedule sends all X before any K and V; the pipelined one lets X of one chunk move while
another is recomputed. Both are convex and made of straight pieces, so the best l lies where two pieces cross, or at an
end.

Row by row, for latency: the weights stay on the GPU and one batch passes through all layers. Column by column, for
throughput: a layer's weights are in host memory too, cross once, and serve several batches; W_K and W_V come first,
so that recomputing starts before the others are there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import Enum

from deltakv.errors import ConfigError


class Schedule(Enum):
    """In which order X, K and V cross the bus."""

    SERIAL = "serial"  #: all X of a round, then its K and V while the GPU recomputes (the paper's)
    PIPELINED = "pipelined"  #: X of the next chunk moves while the last one is recomputed


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer as its cache sees it.

    hidden: the width d of X, what the K and V projections read. kv_heads, head_dim: K and V of a token have
    kv_heads * head_dim elements each. element_bytes: p, bytes an element of X.
    x_bytes, kv_bytes: bytes of a token as they are stored, where that is not d * p and 2 * w * p (quantised, padded).
    """

    hidden: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    x_bytes: int | None = None
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "kv_heads", "head_dim", "element_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def alpha(self) -> int:
        """Bytes of X a token."""
        return self.hidden * self.element_bytes if self.x_bytes is None else self.x_bytes

    @property
    def kappa(self) -> int:
        """Bytes of K and V a token."""
        return 2 * self.kv_width * self.element_bytes if self.kv_bytes is None else self.kv_bytes

    @property
    def phi(self) -> int:
        """FLOP to recompute K and V of a token: two products of [d] by [d, w], two FLOP a multiplication."""
        return 4 * self.hidden * self.kv_width


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machine does, measured at the sizes in question (`Profile.rates`).

    bus: P, bytes a second from the host. gemm: F, FLOP a second of the recomputation.
    other: t_gpu, seconds that the GPU needs for the rest of the layer, attention over all tokens included.
    attention: what of it goes to each token of each row, for who wants to know when.
    """

    bus: float
    gemm: float
    other: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bus > 0 and self.gemm > 0 and self.other >= 0 and self.attention >= 0):  # not a number is none
            raise ConfigError(f"rates must be above 0, and `other` and `attention` not below: {self}")


@dataclass(frozen=True, kw_only=True)
class Column:
    """The throughput-oriented schedule: a layer's weights cross once and serve `batches` batches of the same size.

    first_bytes: W_K and W_V, which cross first. rest_bytes: all other weights of the layer.
    """

    batches: int
    first_bytes: int
    rest_bytes: int

    def __post_init__(self) -> None:
        if self.batches < 1 or min(self.first_bytes, self.rest_bytes) < 0:
            raise ConfigError(f"a column has at least 1 batch, and no negative bytes: {self}")


#: Row by row: the weights are on the GPU, one batch.
ROW = Column(batches=1, first_bytes=0, rest_bytes=0)


@dataclass(frozen=True)
class Parts:
    """Predicted seconds of one layer's decode step, all its batches together; `total` is less than their sum, because
    the bus and the GPU work at the same time."""

    weights: float
    x: float
    kv: float
    recompute: float
    other: float
    total: float


@dataclass(frozen=True)
class Split:
    """The best l for one layer and length.

    tokens: l; of `length` tokens a row the first l are recomputed. parts: with this l; plain: with l = 0.
    reason: why l is 0, or "" if it is not.
    """

    length: int
    tokens: int
    parts: Parts
    plain: Parts
    reason: str = ""

    @property
    def share(self) -> float:
        return self.tokens / self.length if self.length else 0.0

    @property
    def speedup(self) -> float:
        """Over moving everything in the same schedule."""
        return self.plain.total / self.parts.total if self.parts.total else 1.0


def predict(
    shape: LayerShape, rates: Rates, batch: int, length: int, tokens: int, schedule: Schedule, column: Column = ROW
) -> Parts:
    """Seconds of one layer when the first `tokens` of `length` tokens of each of `batch` rows are recomputed."""
    n = column.batches
    weights = (column.first_bytes + column.rest_bytes) / rates.bus
    x = n * batch * tokens * shape.alpha / rates.bus
    kv = n * batch * (length - tokens) * shape.kappa / rates.bus
    recompute = n * batch * tokens * shape.phi / rates.gemm
    total = max(at + slope * tokens for at, slope in _lines(shape, rates, batch, length, schedule, column))
    return Parts(weights, x, kv, recompute, n * rates.other, total)


def _lines(
    shape: LayerShape, rates: Rates, batch: int, length: int, schedule: Schedule, column: Column
) -> list[tuple[float, float]]:
    """The straight lines over l, (seconds at l = 0, seconds a token), whose maximum is the time of the layer."""
    n = column.batches
    first, rest = column.first_bytes / rates.bus, column.rest_bytes / rates.bus
    x, kv = batch * shape.alpha / rates.bus, batch * shape.kappa / rates.bus
    recompute = batch * shape.phi / rates.gemm
    gpu = (n * rates.other, n * recompute)
    if schedule is Schedule.PIPELINED:
        return [gpu, (first + rest + n * length * kv, n * (x - kv))]
    # Each batch's X alone, then the longer of its recomputation, with attention over it, and its K and V; beside the
    # first one's the other weights cross too. What else the GPU computes hides nothing here, but may take longest.
    beside = recompute + batch * rates.attention
    ends = [[(first, x + beside), (first + rest + length * kv, x - kv)]]
    ends += [[(0.0, (n - 1) * (x + beside)), ((n - 1) * length * kv, (n - 1) * (x - kv))]]
    return [gpu, *((one[0] + more[0], one[1] + more[1]) for one in ends[0] for more in ends[1])]


def best_split(
    shape: LayerShape, rates: Rates, batch: int, length: int, schedule: Schedule, column: Column = ROW
) -> Split:
    """The l in [0, length] that takes the least time by `predict`; of equals the least.

    Raises `ConfigError` for a batch or a length below 1.
    """
    if batch < 1 or length < 1:
        raise ConfigError(f"batch={batch} and length={length} must be at least 1")
    plain = predict(shape, rates, batch, length, 0, schedule, column)
    if shape.alpha >= shape.kappa:
        return Split(length, 0, plain, plain, too_wide(shape))
    candidates = {0, length}  # the least maximum of lines lies where two of them cross, or at an end
    for (at, slope), (other_at, other_slope) in itertools.combinations(
        _lines(shape, rates, batch, length, schedule, column), 2
    ):
        if slope != other_slope:
            crossing = min(max((other_at - at) / (slope - other_slope), 0.0), float(length))
            candidates |= {math.floor(crossing), math.ceil(crossing)}
    timed = [(predict(shape, rates, batch, length, tokens, schedule, column), tokens) for tokens in candidates]
    parts, tokens = min(timed, key=lambda pair: (pair[0].total, pair[1]))
    reason = ""
    if not tokens and plain.other >= plain.total:
        reason = "the rest of the layer takes the GPU longer than the bus takes to bring all K and V"
    elif not tokens:
        reason = "the GPU would take longer to recompute even one token than the bus takes to bring it"
    return Split(length, tokens, parts, plain, reason)


def too_wide(shape: LayerShape) -> str:
    """Why a layer whose X is no smaller than its K and V moves all K and V."""
    why = "grouped-query attention" if 2 * shape.kv_width <= shape.hidden else "a quantised cache"
    return (
        f"{why}: K and V of a token are {shape.kappa:,} bytes and X is {shape.alpha:,}, so sending X instead "
        "never pays; all K and V cross, overlapped"
    )
