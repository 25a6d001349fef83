"""`deltakv bench offload`: ways to decode with K and V in host memory, measured beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltakv.cli import options
from deltakv.cli.bench import Batch, Context, Model, Output
from deltakv.errors import InputError


def offload(
    model: Model = "opt-6.7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers, for a smaller machine.")] = None,
    input_len: Context = 2048,
    batch_size: Batch = 32,
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps a variant.")] = 5,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="device, naive, transformers, overlapped, serial or pipelined; several times (default: all)."
        ),
    ] = None,
    recompute: Annotated[str, typer.Option(help="auto, or the share that serial and pipelined recompute.")] = "auto",
    bits: Annotated[int, typer.Option(help="Of K and V in host memory: 16, 8 or 4.")] = 16,
    chunk_mib: Annotated[float, typer.Option(help="MiB of a chunk on the device.")] = 32,
    chunks: Annotated[int, typer.Option(help="Chunks on the device.")] = 8,
    output_json: Output = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the timelines.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (fp16, fp32 on a CPU), float32, bfloat16 or float16.")] = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measures decode steps with K and V in host memory, and predicts them from rates measured in the same run.

    [bold]Example:[/bold] deltakv bench offload --model opt-6.7b --input-len 2048 --batch-size 32 --json offload.json
    """
    options.check_picture(plot, (".png", ".svg", ".pdf"))
    options.check_output(output_json, plot)
    from deltakv.bench.offload import VARIANTS, OffloadBench, timelines
    from deltakv.loading import find_device
    from deltakv.offload.config import Host

    wanted = variant or list(VARIANTS)
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise InputError(f"unknown variant {unknown[0]!r}; allowed are {', '.join(VARIANTS)}")
    base = Host(recompute=_share(recompute), bits=bits, chunk_mib=chunk_mib, chunks=chunks)
    import torch

    from deltakv.bench.dims import find_config, make_model, resized
    from deltakv.bench.provenance import provenance
    from deltakv.integrations.hf.profiling import measure_model
    from deltakv.integrations.hf.shapes import layer_shape
    from deltakv.report.tables import plan_table, print_table

    if threads is not None:
        torch.set_num_threads(threads)
    config = resized(find_config(model), input_len + steps + 3, layers)
    where = find_device(device)
    kind = _dtype(dtype, where)
    with options.status(f"making {model}"):
        made = make_model(config, kind, where)
    with options.status("measuring rates"):
        profile = measure_model(made)
    shape = layer_shape(config, kind, bits)
    results = OffloadBench(made, shape, profile, base, batch_size, input_len, steps).run(wanted)
    plain = next((r.seconds for r in results if r.name == "overlapped"), None)
    rows = [_row(result.numbers(), plain) for result in results]
    title = (
        f"{model}, {config.num_hidden_layers} layers, {str(kind).removeprefix('torch.')}, batch {batch_size} at "
        f"{input_len:,} tokens on {profile.machine}"
    )
    if found := [result.forecast.rates for result in results if result.forecast is not None]:
        title += f"\nbus {found[-1].bus / 1e9:.1f} GB/s, recomputing {found[-1].gemm / 1e12:,.3g} TFLOP/s, measured now"
    headings = ["variant", "", "ms a step", "vs overlapped", "predicted ms", "off by", "recomputed", "GB/s", "GPU busy"]
    print_table(plan_table(rows, headings), title)
    options.write_json(
        output_json,
        {
            **provenance(made),
            "bench": "offload",
            "model": model,
            "layers": config.num_hidden_layers,
            "context": input_len,
            "batch": batch_size,
            "recompute": base.recompute,
            "bits": bits,
            "chunk_bytes": base.chunk_bytes,
            "chunks": base.chunks,
            "measured_on": profile.machine,
            "results": [result.numbers() for result in results],
        },
    )
    if plot is not None and (drawn := timelines(results)):
        from deltakv.report.timelines import timeline_plot

        timeline_plot(drawn, f"{title.splitlines()[0]}; the bars are the prediction", plot)
        options.say(f"plot: {plot}")


def _share(text: str) -> float | str:
    """What `Host` takes; it refuses what it does not know."""
    try:
        return float(text)
    except ValueError:
        return text


def _row(result: dict[str, Any], plain: float | None) -> list[str]:
    seconds, predicted, found = result["step_seconds"], result["predicted_seconds"], result["forecast"]
    if seconds is None:
        return [result["variant"], result["failed"], *[""] * 7]
    return [
        result["variant"],
        found["reason"] if found and result["variant"] in ("serial", "pipelined") else "",
        f"{seconds * 1e3:,.1f}",
        f"{plain / seconds:.2f}x" if plain else "",
        f"{predicted * 1e3:,.1f}" if predicted else "",
        f"{seconds / predicted - 1:+.0%}" if predicted else "",
        f"{found['share']:.0%}" if found else "",
        f"{result['moved_bytes'] / seconds / 1e9:.1f}" if result["moved_bytes"] else "",
        "" if result["gpu_busy"] is None else f"{result['gpu_busy']:.0%}",
    ]


def _dtype(name: str, device: Any) -> Any:
    import torch

    from deltakv.loading.model import DTYPES

    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
