"""`deltakv bench offload-memory` and `offload-mixed`: memory as rows grow, and over many requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakv.cli import options
from deltakv.cli.bench_job import Job
from deltakv.errors import InputError

Model = Annotated[
    str, typer.Option("--model", "-m", help="Whose dimensions, as in `bench offload`. Weights are random.")
]
Layers = Annotated[int | None, typer.Option(min=1, help="Fewer layers, for a smaller machine.")]
Recompute = Annotated[float, typer.Option(help="The share of each row that is recomputed, in [0, 1].")]
ChunkMib = Annotated[float, typer.Option(help="MiB of a chunk on the device.")]
Chunks = Annotated[int, typer.Option(help="Chunks on the device.")]
Dtype = Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on CPU), float32, bfloat16 or float16.")]
Output = Annotated[Path | None, typer.Option("--output-json", "--json", help="Write the results to this JSON file.")]


def offload_memory(
    model: Model = "llama-2-7b",
    layers: Layers = None,
    input_len: Annotated[
        str, typer.Option("--input-len", "--context", help="Lengths that the rows grow to, ascending, commas between.")
    ] = "2000,4000,8000,16000,32000",
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Rows.")] = 2,
    columns: Annotated[int, typer.Option(min=1, help="Columns of a forward of the prompt.")] = 1000,
    recompute: Recompute = 1.0,
    chunk_mib: ChunkMib = 4,
    chunks: Chunks = 8,
    dtype: Dtype = "auto",
    device: options.Device = "auto",
    output_json: Output = None,
) -> None:
    """Measures the device memory of prompts and decode steps, weights aside, as K and V grow in host memory.

    [bold]Example:[/bold] deltakv bench offload-memory --model llama-2-7b --context 2000,32000
    """
    from deltakv.offload.config import Host

    lengths = options.numbers("--input-len", input_len)
    if lengths != sorted(set(lengths)):
        raise InputError(f"--input-len {input_len} must ascend")
    host = Host(recompute=recompute, chunk_mib=chunk_mib, chunks=chunks)
    job = Job(model, ["full"], device, dtype, output_json, None)
    from deltakv.bench.dims import resized
    from deltakv.bench.offload_life import grow
    from deltakv.report.tables import mebibytes, plan_table

    job.config = resized(job.config, lengths[-1] + 2, layers)
    with job.work("offload-memory", len(lengths) + 1) as (made, advance):
        found = grow(made, host, batch_size, lengths, columns, advance)
    first = found[0].decode_peak or 1
    rows = [
        [
            f"{one.length:,}",
            "",
            mebibytes(one.decode_peak),
            f"{one.decode_peak / first - 1:+.1%}",
            mebibytes(one.prefill_peak),
            mebibytes(one.chunk_bytes),
            mebibytes(one.host_bytes),
        ]
        for one in found
    ]
    depth = job.config.num_hidden_layers
    title = f"{model}, {depth} layers, {job.dtype_name}, batch {batch_size}, {job.device_name}: memory, weights aside"
    headings = ["tokens", "", "a step", "to the first", "the prompt, by chunks", "of it K, V and X", "on the host"]
    job.show(plan_table(rows, headings), title)
    job.write(
        {
            "bench": "offload-memory",
            "layers": depth,
            "batch": batch_size,
            "columns": columns,
            "recompute": recompute,
            "chunk_bytes": host.chunk_bytes,
            "chunks": chunks,
        },
        [one.numbers() for one in found],
    )


def offload_mixed(
    model: Model = "opt-6.7b",
    layers: Layers = None,
    minutes: Annotated[float, typer.Option(min=0, help="How long to go on.")] = 10,
    recompute: Recompute = 0.8,
    chunk_mib: ChunkMib = 32,
    chunks: Chunks = 8,
    short: Annotated[
        bool, typer.Option("--short", help="Prompts of a hundredth, for a look at the machinery.")
    ] = False,
    dtype: Dtype = "auto",
    device: options.Device = "auto",
    output_json: Output = None,
) -> None:
    """Runs rounds of mixed requests with K and V in host memory, and measures what the process holds after each.

    [bold]Example:[/bold] deltakv bench offload-mixed --model opt-6.7b --minutes 10
    """
    from deltakv.offload.config import Host

    host = Host(recompute=recompute, chunk_mib=chunk_mib, chunks=chunks)
    job = Job(model, ["full"], device, dtype, output_json, None)
    from deltakv.bench.dims import resized
    from deltakv.bench.offload_life import REQUESTS, live
    from deltakv.report.tables import mebibytes, plan_table

    requests = [(rows, max(1, length // 100 if short else length), new) for rows, length, new in REQUESTS]
    job.config = resized(job.config, max(length + new for _, length, new in requests) + 2, layers)
    with job.work("offload-mixed", 1) as (made, _):
        found = live(made, host, minutes, requests)
    shown = [found[0], *found[1 :: max(1, (len(found) - 1) // 8)]]
    shown += [found[-1]] if shown[-1] is not found[-1] else []
    rows = [
        [
            f"{one.seconds / 60:.1f}",
            "",
            f"{one.requests:,}",
            mebibytes(one.rss),
            mebibytes(one.pinned),
            mebibytes(one.device),
        ]
        for one in shown
    ]
    depth = job.config.num_hidden_layers
    title = f"{model}, {depth} layers, {job.dtype_name}, {job.device_name}: {found[-1].requests:,} mixed requests"
    job.show(plan_table(rows, ["minutes", "", "requests", "process", "page-locked", "on the device"]), title)
    job.write(
        {
            "bench": "offload-mixed",
            "layers": depth,
            "requests": requests,
            "recompute": recompute,
            "chunk_bytes": host.chunk_bytes,
            "chunks": chunks,
        },
        [one.numbers() for one in found],
    )
