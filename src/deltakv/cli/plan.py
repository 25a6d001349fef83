"""`deltakv plan`: what a decode step of a model will read, before anything but its config is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltakv.cli import options
from deltakv.cli.checks import check_methods
from deltakv.errors import InputError

if TYPE_CHECKING:
    from deltakv.offload.config import Host

ROLE_NAMES = {
    "F": "FULL",
    "S": "SELECT (Δ)",
    "R": "REUSE",
    "W": "WINDOW (sinks, recent)",
    "window": "sliding window",
}


def plan(
    model: options.Model = options.DEFAULT_MODEL,
    method: options.OneMethod = options.DEFAULT_METHOD,
    context: Annotated[str, typer.Option(help="Lengths in tokens, with commas between.")] = "4000,8000",
    batch: Annotated[int, typer.Option(min=1, help="Rows that decode together.")] = 1,
    json_file: options.Json = None,
    dtype: options.Dtype = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="K and V in host memory: what is recomputed.")] = False,
    schedule: Annotated[str, typer.Option(help="With --offload: pipelined, or serial (the paper's).")] = "pipelined",
    bits: Annotated[int, typer.Option(help="With --offload: of K and V in host memory, 16, 8 or 4.")] = 16,
    chunk_mib: Annotated[float, typer.Option(help="With --offload: MiB of a chunk on the device.")] = 32,
    batches: Annotated[
        int, typer.Option(min=1, help="With --offload: batches that share weights from host memory; 1 keeps them on.")
    ] = 1,
    profile: Annotated[Path | None, typer.Option(help="With --offload: measured rates, as JSON.")] = None,
    device: options.Device = "auto",
    plot: Annotated[Path | None, typer.Option(help="With --offload: draw the timeline.")] = None,
) -> None:
    """Shows a model's layers, their roles, the bytes a decode step reads and the predicted saving.

    [bold]Example:[/bold] deltakv plan --method delta:budget=1024 --context 4000,8000 --batch 8

    With --offload: which share of K and V to recompute, and what crosses the bus when (rates are measured once).
    Only the model's config is loaded.
    """
    options.check_picture(plot, (".png", ".svg", ".pdf"))
    options.check_output(json_file, plot)
    if offload:
        from deltakv.offload.config import Host

        host = Host(schedule=schedule, bits=bits, chunk_mib=chunk_mib, profile=profile)
        _offload(model, host, options.numbers("--context", context), batch, batches, dtype, device, json_file, plot)
        return
    if plot is not None or profile is not None:
        raise InputError("--plot and --profile belong to --offload; add it, or leave them out")
    chosen = options.parse_method(method, model)
    lengths = options.numbers("--context", context)

    from deltakv.bench.floors import step_cost
    from deltakv.bench.provenance import provenance
    from deltakv.integrations.hf.support import model_shape
    from deltakv.report.tables import plan_table, print_table

    config = check_methods(model, [chosen], _within_limit(lengths), by_dims=True)
    shape = model_shape(config)
    kind = _dtype(dtype, config)
    cost = step_cost(config, shape.windows, chosen, kind)
    weights = cost.weight_bytes(batch)
    results: list[dict[str, Any]] = []
    for length in lengths:
        read = cost.kv_bytes(length, batch, chosen)
        full = batch * sum(
            layer.bytes_a_token * (min(length, layer.window) if layer.window else length) for layer in cost.layers
        )
        results.append(
            {
                "context": length,
                "batch": batch,
                "weight_bytes": round(weights),
                "kv_bytes_by_role": read,
                "kv_bytes": sum(read.values()),
                "full_kv_bytes": full,
                "attended_tokens": cost.attended_tokens(length, chosen),
                "predicted_speedup": (weights + full) / (weights + sum(read.values())),
            }
        )

    rows = []
    for letter, name in ROLE_NAMES.items():
        layers = [layer.index for layer in cost.layers if layer.role == letter]
        if layers:
            sizes = [_megabytes(result["kv_bytes_by_role"][letter]) for result in results]
            rows.append([name, f"{len(layers)}: {_ranges(layers)}", *sizes])
    rows.append(["weights", "", *[_megabytes(weights) for _ in results]])
    rows.append(["a step reads", "", *[_megabytes(weights + r["kv_bytes"]) for r in results]])
    rows.append(["with full attention", "", *[_megabytes(weights + r["full_kv_bytes"]) for r in results]])
    rows.append(["attended tokens", "a step and row", *[f"{r['attended_tokens']:,}" for r in results]])
    rows.append(["predicted", "by bytes alone", *[f"{r['predicted_speedup']:.2f}x faster" for r in results]])
    about = f"{config.model_type}, {len(cost.layers)} layers, {kind}"
    title = f"{model} ({about}), {method}, batch {batch}\nplan: {cost.plan}"
    headings = ["role", "layers", *[f"at {length:,} tokens" for length in lengths]]
    print_table(plan_table(rows, headings), title)
    options.write_json(
        json_file,
        {
            **provenance(),
            "model": model,
            "method": method,
            "plan": str(cost.plan),
            "dtype": str(kind).removeprefix("torch."),
            "layers": [{"index": c.index, "role": c.role, "window": c.window} for c in cost.layers],
            "results": results,
        },
    )


def _offload(
    model: str,
    host: Host,
    lengths: list[int],
    batch: int,
    batches: int,
    dtype: str,
    device: str,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    from deltakv.cli.plan_offload import plan_offload

    config = check_methods(model, [], _within_limit(lengths), by_dims=True)
    plan_offload(model, config, _dtype(dtype, config), host, lengths, batch, batches, device, json_file, plot)


def _within_limit(lengths: list[int]) -> Callable[[Any], None]:
    """A check that the model's positions reach that far."""
    from deltakv.loading import check_length

    def check(config: Any) -> None:
        for length in lengths:
            check_length(length, config, f"--context {length}")

    return check


def _dtype(name: str, config: Any) -> Any:
    """torch's dtype of that name; `auto` is what `generate` would load here."""
    import torch

    from deltakv.loading.model import DTYPES

    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    if name != "auto":
        return getattr(torch, name)
    return (config.dtype or torch.float32) if torch.cuda.is_available() else torch.float32


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
