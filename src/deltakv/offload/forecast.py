"""What a decode step will take, piece by piece: the scheduler's split, played through with a profile's rates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from deltakv.offload.config import Host
from deltakv.offload.pieces import pieces
from deltakv.offload.profile import Profile
from deltakv.offload.scheduler import ROW, Column, LayerShape, Rates, Schedule, Split, best_split, predict
from deltakv.offload.timeline import Timeline, simulate


@dataclass(frozen=True)
class Forecast:
    """A decode step. split: of each layer. timeline: all layers, on finite chunks. rates: what it rests on."""

    split: Split
    timeline: Timeline
    rates: Rates

    def numbers(self) -> dict[str, Any]:
        """For JSON; seconds, bytes a second and FLOP a second."""
        split, parts = self.split, self.split.parts
        return {
            "length": split.length,
            "recomputed_tokens": split.tokens,
            "share": split.share,
            "reason": split.reason,
            "layer_seconds": dataclasses.asdict(parts),
            "layer_seconds_moving_all": split.plain.total,
            "layer_speedup": split.speedup,
            "step_seconds": self.timeline.seconds,
            "bus_busy": self.timeline.busy("bus"),
            "gpu_busy": self.timeline.busy("GPU"),
            "rates": dataclasses.asdict(self.rates),
        }


def forecast(
    shape: LayerShape,
    profile: Profile,
    host: Host,
    layers: int,
    batch: int,
    length: int,
    *,
    tokens: int | None = None,
    column: Column = ROW,
) -> Forecast:
    """One decode step of `layers` such layers, for `batch` rows of `length` tokens.

    host: schedule, overlap and chunks. tokens: recompute so many; None for the scheduler's best.
    column: batches and weights of the throughput-oriented schedule.
    Raises `InputError` if the profile is of another layer shape.
    """
    schedule = Schedule(host.schedule)
    rates = profile.rates(shape, batch, length, host.chunk_bytes, pinned=host.pinned)
    split = best_split(shape, rates, batch, length, schedule, column)
    if tokens is not None:
        parts = predict(shape, rates, batch, length, tokens, schedule, column)
        split = dataclasses.replace(split, tokens=tokens, parts=parts, reason="" if tokens else "nothing was asked for")
    x_tokens, kv_tokens = (max(1, host.chunk_bytes // (batch * size)) for size in (shape.alpha, shape.kappa))
    cut = pieces(length, split.tokens, x_tokens, kv_tokens, schedule, host.together)
    timeline = simulate([cut] * layers, shape, rates, batch, host.chunks, overlap=host.overlap, column=column)
    return Forecast(split, timeline, rates)
