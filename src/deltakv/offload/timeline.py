"""When the bus and the GPU do what: a decode step played through, piece by piece, with measured rates.

The scheduler's formulas leave out what this shows: that chunks are finite, that only so many fit on the device, and
that the first one of a step has to be waited for. So this is what a measurement is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltakv.offload.pieces import Kind, Piece
from deltakv.offload.scheduler import ROW, Column, LayerShape, Rates


@dataclass(frozen=True)
class Span:
    """lane: "bus" or "GPU". what: "weights", "X", "KV", "recompute" or "rest", attention being of the rest. start,
    stop: seconds from the step's start."""

    lane: str
    what: str
    layer: int
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """What one decode step takes, in seconds, and how it comes about."""

    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        return max((span.stop for span in self.spans), default=0.0)

    def busy(self, lane: str) -> float:
        """The share of the step in which that lane works."""
        taken = sum(span.stop - span.start for span in self.spans if span.lane == lane)
        return taken / self.seconds if self.seconds else 0.0


def simulate(
    layers: Sequence[Sequence[Piece]],
    shape: LayerShape,
    rates: Rates,
    batch: int,
    slots: int,
    *,
    overlap: bool = True,
    column: Column = ROW,
) -> Timeline:
    """Plays one decode step through `layers`, the pieces of each, on `slots` chunks of device memory.

    overlap: copies run beside the GPU's work, into any chunk that is free; otherwise each waits for all before it.
    column: how many batches of `batch` rows take turns in a layer, and its weights, which cross before them, to where
    those of the layer before the last were.
    """
    spans: list[Span] = []
    bus = gpu = 0.0
    arrived: list[float] = []  # when each piece has crossed
    done: list[float] = []  # when the GPU is through with it: then its chunk is free
    ends: list[float] = []  # when it is through with each layer
    weights = (column.first_bytes + column.rest_bytes) / rates.bus
    for layer, pieces in enumerate(layers):
        if weights:
            start = max(bus, ends[-2] if len(ends) > 1 else 0.0)
            bus = start + weights
            spans.append(Span("bus", "weights", layer, start, bus))
            gpu = max(gpu, bus)
        rest = rates.other - batch * sum(piece.tokens for piece in pieces) * rates.attention
        for _ in range(column.batches):
            first = len(done)
            for piece in pieces:
                while len(arrived) <= len(done) + piece.ahead:
                    number = len(arrived)
                    coming = pieces[number - first]
                    wait = done[number - slots] if number >= slots else 0.0
                    if coming.barrier and number:
                        wait = max(wait, done[number - 1])
                    if not overlap:
                        wait = max(wait, gpu)
                    size = shape.alpha if coming.kind is Kind.X else shape.kappa
                    start = max(bus, wait)
                    bus = start + batch * coming.tokens * size / rates.bus
                    spans.append(Span("bus", coming.kind.value, layer, start, bus))
                    arrived.append(bus)
                begin = max(gpu, arrived[len(done) + piece.ahead])
                gpu = begin + batch * piece.tokens * (shape.phi / rates.gemm if piece.kind is Kind.X else 0.0)
                spans.append(Span("GPU", "recompute", layer, begin, gpu))
                spans.append(Span("GPU", "rest", layer, gpu, gpu + batch * piece.tokens * rates.attention))
                gpu = spans[-1].stop
                done.append(gpu)
            spans.append(Span("GPU", "rest", layer, gpu, gpu + max(rest, 0.0)))
            gpu = spans[-1].stop
        ends.append(gpu)
    return Timeline(tuple(span for span in spans if span.stop > span.start))


def draw(timeline: Timeline, first: int = 0, layers: int = 2, width: int = 96) -> str:
    """A picture in text of `layers` layers from `first` on: a line for the bus and one for the GPU.

    W: weights cross; X: X; =: K and V; R: recomputing; o: the rest of the layer; a dot: nothing to do.
    """
    chosen = [span for span in timeline.spans if first <= span.layer < first + layers]
    if not chosen:
        return ""
    start, stop = min(span.start for span in chosen), max(span.stop for span in chosen)
    step = (stop - start) / width
    lines = []
    for lane in ("bus", "GPU"):
        cells = ""
        for cell in range(width):
            middle = start + (cell + 0.5) * step
            at = next((s.what for s in timeline.spans if s.lane == lane and s.start <= middle < s.stop), "")
            cells += {"weights": "W", "X": "X", "KV": "=", "recompute": "R", "rest": "o"}.get(at, "·")
        lines.append(f"{lane}  {cells}")
    lines.append(f"     0{f'{(stop - start) * 1e3:,.2f} ms':>{width - 1}}")
    return "\n".join(lines)
