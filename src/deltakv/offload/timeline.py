"""When the bus and the GPU do what: a decode step played through, piece by piece, with measured rates.

The scheduler's formulas leave out what this shows: that chunks are finite, that only so many fit on the device, and
that the first one of a step has to be waited for. So this is what a measurement is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltakv.offload.pieces import Kind, Piece
from deltakv.offload.scheduler import LayerShape, Rates


@dataclass(frozen=True)
class Span:
    """lane: "bus" or "GPU". what: "X", "KV", "recompute" or "rest". start, stop: seconds from the step's start."""

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
    layers: Sequence[Sequence[Piece]], shape: LayerShape, rates: Rates, batch: int, slots: int, *, overlap: bool = True
) -> Timeline:
    """Plays one decode step through `layers`, the pieces of each, on `slots` chunks of device memory.

    overlap: copies run beside the GPU's work, into any chunk that is free; otherwise each waits for all before it.
    """
    spans: list[Span] = []
    bus = gpu = 0.0
    done: list[float] = []  # when the GPU is through with each piece: then its chunk is free
    for layer, pieces in enumerate(layers):
        for piece in pieces:
            is_x = piece.kind is Kind.X
            wait = done[-slots] if len(done) >= slots else 0.0
            if piece.barrier and done:
                wait = max(wait, done[-1])
            if not overlap:
                wait = max(wait, gpu)
            start = max(bus, wait)
            bus = start + batch * piece.tokens * (shape.alpha if is_x else shape.kappa) / rates.bus
            spans.append(Span("bus", piece.kind.value, layer, start, bus))
            if is_x:
                begin = max(gpu, bus)
                gpu = begin + batch * piece.tokens * shape.phi / rates.gemm
                spans.append(Span("GPU", "recompute", layer, begin, gpu))
            done.append(max(gpu, bus))
        # Attention over all pieces is in `rest`: which of them it belongs to hardly matters, as it is short.
        begin = max(gpu, bus) if pieces else gpu
        gpu = begin + rates.other
        if rates.other:
            spans.append(Span("GPU", "rest", layer, begin, gpu))
    return Timeline(tuple(spans))


def draw(timeline: Timeline, first: int = 0, layers: int = 2, width: int = 96) -> str:
    """A picture in text of `layers` layers from `first` on: a line for the bus and one for the GPU.

    X: X crosses; =: K and V cross; R: recomputing; o: the rest of the layer; a dot: nothing to do.
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
            cells += {"X": "X", "KV": "=", "recompute": "R", "rest": "o"}.get(at, "·")
        lines.append(f"{lane}  {cells}")
    lines.append(f"     0{f'{(stop - start) * 1e3:,.2f} ms':>{width - 1}}")
    return "\n".join(lines)
