"""`deltakv bench offload`: ways to decode with K and V in host memory, measured beside what was predicted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from deltakv.cli import options
from deltakv.cli.bench_job import Job


def offload(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Whose dimensions: opt-6.7b, opt-13b, llama-2-7b, qwen2.5-7b, tiny, or as in `bench step`. "
            "Weights are random.",
        ),
    ] = "opt-6.7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers, for a smaller machine.")] = None,
    input_len: Annotated[int, typer.Option("--input-len", "--context", min=2, help="Tokens of each prompt.")] = 2048,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Rows that decode together.")] = 32,
    batches: Annotated[
        int,
        typer.Option(min=1, help="Batches that take turns in each layer; its weights then are in host memory too."),
    ] = 1,
    num_iters: Annotated[int, typer.Option("--num-iters", min=1, help="Timed decode steps a variant.")] = 5,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="device, naive, transformers, overlapped, serial, pipelined (all of them if none is given), int8 or "
            "int4, one by one; with --batches overlapped, serial or pipelined."
        ),
    ] = None,
    recompute: Annotated[str, typer.Option(help="auto, or the share that serial and pipelined recompute.")] = "auto",
    bits: Annotated[int, typer.Option(help="Of K and V in host memory: 16, 8 or 4.")] = 16,
    chunk_mib: Annotated[float, typer.Option(help="MiB of a chunk on the device.")] = 64,
    chunks: Annotated[int, typer.Option(help="Chunks on the device.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="auto (bf16 on a GPU, fp32 on CPU), float32, bfloat16 or float16.")
    ] = "auto",
    device: options.Device = "auto",
    output_json: Annotated[
        Path | None, typer.Option("--output-json", "--json", help="Write the results to this JSON file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the timelines (default: beside the JSON, as .png).")] = None,
) -> None:
    """Measures decode steps with K and V in host memory, and predicts them from rates measured in the same run.

    [bold]Example:[/bold] deltakv bench offload --model opt-6.7b --context 2048 --batch 32 --dtype float16
    """
    from deltakv.bench.offload import OffloadBench
    from deltakv.bench.offload_run import OffloadRun
    from deltakv.bench.offload_steps import Measured, timelines
    from deltakv.bench.throughput import ThroughputBench
    from deltakv.offload.config import Host

    kind: type[OffloadRun] = OffloadBench if batches == 1 else ThroughputBench
    wanted = kind.ordered(variant or kind.usual)  # refused before weights are made
    base = Host(recompute=_share(recompute), bits=bits, chunk_mib=chunk_mib, chunks=chunks)
    job = Job(model, ["full"], device, dtype, output_json, plot)
    from deltakv.bench.dims import resized
    from deltakv.integrations.hf.profiling import measure_model
    from deltakv.report.tables import plan_table
    from deltakv.report.timelines import timeline_plot

    job.config = resized(job.config, input_len + num_iters + 3, layers)
    depth = job.config.num_hidden_layers
    with job.work("offload", len(wanted) + 3) as (made, advance):
        advance("rates")
        profile = measure_model(made)
        asked = (made, profile, base, batch_size, input_len, num_iters, advance)
        bench: OffloadRun
        bench = OffloadBench(*asked) if batches == 1 else ThroughputBench(*asked, batches=batches)

        def keep(results: list[Measured]) -> None:
            job.write(
                {
                    "bench": "offload",
                    "layers": depth,
                    "context": input_len,
                    "batch": batch_size,
                    "batches": batches,
                    "recompute": base.recompute,
                    "bits": bits,
                    "chunk_bytes": base.chunk_bytes,
                    "chunks": base.chunks,
                    "measured_on": profile.machine,
                    "pinned_bytes": bench.pinned_bytes,
                    "pin_seconds": bench.pin_seconds,
                    "profile": profile.numbers(),
                },
                [result.numbers() for result in results],
                say=len(results) == len(wanted),
            )

        bench.found = keep  # after each variant: a run that is killed has lost one of them
        results = bench.run(wanted)
    plain = next((r.seconds for r in results if r.name == "overlapped"), None)
    rows = [_row(result.numbers(), plain) for result in results]
    what = f"{batches} x {batch_size} rows" if batches > 1 else f"batch {batch_size}"
    title = f"{model}, {depth} layers, {job.dtype_name}, {what} at {input_len:,} tokens, {profile.machine}"
    subtitle = ""
    if found := [result.forecast.rates for result in results if result.forecast is not None]:
        subtitle = (
            f"\nbus {found[-1].bus / 1e9:.1f} GB/s, recomputing {found[-1].gemm / 1e12:,.3g} TFLOP/s, just measured"
        )
    if bench.pinned_bytes:
        subtitle += f"; {bench.pinned_bytes / 1e9:,.1f} GB page-locked in {bench.pin_seconds:,.1f} s"
    headings = ["variant", "", "ms a step", "vs overlapped", "predicted ms", "off by", "recomputed", "GB/s"]
    headings += ["of the bus", "GPU busy"]
    job.show(plan_table(rows, headings), title + subtitle)
    if drawn := timelines(results):
        times = {result.name: result.seconds for result in results if result.forecast and result.seconds}
        best = min(times, key=lambda name: times[name])
        headline = f"{best} takes {times[best] * 1e3:,.0f} ms a step"
        if plain and best != "overlapped":
            headline += f", {plain / times[best]:.2f}x the speed of moving all K and V beside the work"
        picture = partial(timeline_plot, headline=headline)
        job.draw(picture, drawn, f"{title}; measured, and predicted from rates measured in this run")


def _share(text: str) -> float | str:
    """What `Host` takes; it refuses what it does not know."""
    try:
        return float(text)
    except ValueError:
        return text


def _row(result: dict[str, Any], plain: float | None) -> list[str]:
    seconds, predicted, found = result["step_seconds"], result["predicted_seconds"], result["forecast"]
    if seconds is None:
        return [result["variant"], result["failed"], *[""] * 8]
    return [
        result["variant"],
        found["reason"] if found and result["variant"] in ("serial", "pipelined") else "",
        f"{seconds * 1e3:,.1f}",
        f"{plain / seconds:.2f}x" if plain else "",
        f"{predicted * 1e3:,.1f}" if predicted else "",
        f"{seconds / predicted - 1:+.0%}" if predicted else "",
        f"{found['share']:.0%}" if found else "",
        f"{result['moved_bytes'] / seconds / 1e9:.1f}" if result["moved_bytes"] else "",
        f"{result['share_of_bus']:.0%}" if result["share_of_bus"] else "",
        "" if result["gpu_busy"] is None else f"{result['gpu_busy']:.0%}",
    ]
