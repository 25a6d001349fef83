"""`deltakv plan --offload`: what a decode step with K and V in host memory will take, and what is recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltakv.cli import options
from deltakv.errors import InputError
from deltakv.offload.config import Host


def plan_offload(
    model: str,
    config: Any,
    dtype: Any,
    host: Host,
    lengths: Sequence[int],
    batch: int,
    batches: int,
    device: str,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Prints the table and the timeline, and writes JSON and picture.

    config: the text model's. dtype: torch's. host: schedule, bits, chunks and profile. batches: how many share a
    layer's weights from host memory, column by column; 1 for weights on the GPU.
    """
    from deltakv.bench.provenance import provenance
    from deltakv.integrations.hf.shapes import layer_shape, layer_weights
    from deltakv.offload.forecast import forecast
    from deltakv.offload.scheduler import ROW, Column
    from deltakv.offload.timeline import draw
    from deltakv.report.tables import plan_table, print_table

    shape = layer_shape(config, dtype, host.bits)
    profile = _profile(config, dtype, host, device)
    column = ROW
    if batches > 1:
        first, rest = layer_weights(config, dtype)
        column = Column(batches=batches, first_bytes=first, rest_bytes=rest)
    layers = config.num_hidden_layers
    found = [forecast(shape, profile, host, layers, batch, length, column=column) for length in lengths]

    def row(what: str, unit: str, cells: Sequence[str]) -> list[str]:
        return [what, unit, *cells]

    stored = [batches * batch * (f.split.length * shape.kappa + f.split.tokens * shape.alpha) for f in found]
    weights = column.first_bytes + column.rest_bytes  # in host memory too, where several batches share them
    rows = [
        row("recomputed", "tokens, share", [f"{f.split.tokens:,} ({f.split.share:.0%})" for f in found]),
        row("X crosses", "ms a layer", [_ms(f.split.parts.x) for f in found]),
        row("K and V cross", "ms a layer", [_ms(f.split.parts.kv) for f in found]),
        row("recomputing", "ms a layer", [_ms(f.split.parts.recompute) for f in found]),
        row("rest of the layer", "ms a layer", [_ms(f.split.parts.other) for f in found]),
        row("a layer", "ms", [_ms(f.split.parts.total) for f in found]),
        row("moving all", "ms a layer", [_ms(f.split.plain.total) for f in found]),
        row("predicted", "by the layer", [f"{f.split.speedup:.2f}x faster" for f in found]),
        row("a step", "ms, on these chunks", [_ms(f.timeline.seconds) for f in found]),
        row("host memory", "GB", [f"{layers * (nbytes + weights) / 1e9:,.2f}" for nbytes in stored]),
    ]
    if batches > 1:
        rows.insert(1, row("weights cross", "ms a layer", [_ms(f.split.parts.weights) for f in found]))
    rates = found[-1].rates
    how = f"column by column, {batches} batches" if batches > 1 else "row by row"
    title = (
        f"{model}: {config.model_type}, {layers} layers, {str(dtype).removeprefix('torch.')}, batch {batch}, "
        f"{host.schedule}, {how}\nmeasured on {profile.machine}: bus {rates.bus / 1e9:.1f} GB/s, "
        f"recomputing {rates.gemm / 1e12:,.3g} TFLOP/s"
    )
    headings = ["what", "", *[f"at {length:,} tokens" for length in lengths]]
    print_table(plan_table(rows, headings), title)
    for forecast_ in found:
        if forecast_.split.reason:
            print(f"nothing is recomputed at {forecast_.split.length:,} tokens: {forecast_.split.reason}")
    print(f"\ntwo layers at {lengths[-1]:,} tokens (W: weights, X: X, =: K and V cross, R: recomputing, o: the rest)")
    print(draw(found[-1].timeline, first=min(1, layers - 1)))
    options.write_json(
        json_file,
        {
            **provenance(),
            "model": model,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "batches": batches,
            "schedule": host.schedule,
            "bits": host.bits,
            "chunk_bytes": host.chunk_bytes,
            "chunks": host.chunks,
            "measured_on": profile.machine,
            "results": [f.numbers() for f in found],
        },
    )
    if plot is not None:
        from deltakv.report.timelines import timeline_plot

        moving = forecast(shape, profile, host, layers, batch, lengths[-1], tokens=0, column=column)
        named = [("moving all K and V", moving.timeline), (f"{host.schedule}, as planned", found[-1].timeline)]
        timeline_plot(named, f"{model}, batch {batch}, {lengths[-1]:,} tokens; rates of {profile.machine}", plot)
        options.say(f"plot: {plot}")


def _profile(config: Any, dtype: Any, host: Host, device: str) -> Any:
    """From a file, or measured with a layer of random weights."""
    import torch

    from deltakv.offload.profile import Profile

    if host.profile is not None:
        return Profile.load(Path(host.profile), dtype)
    if device == "auto" and not torch.cuda.is_available():
        raise InputError(
            "--offload needs rates that were measured, and this machine has no GPU; give --profile FILE (kept in the "
            "cache folder of the machine that has one), or --device cpu to see what memory alone would do"
        )
    from deltakv.integrations.hf.profiling import known_or_measured, one_layer

    with options.status("measuring"):
        return known_or_measured(one_layer(config, dtype, "cuda" if device == "auto" else device))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}" if seconds < 0.1 else f"{seconds * 1e3:,.1f}"
