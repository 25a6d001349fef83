"""`deltakv bench`: how fast a decode step is, beside full attention at its best and beside the floor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from deltakv.cli import options
from deltakv.cli.bench_job import Job
from deltakv.cli.bench_offload import offload
from deltakv.cli.bench_offload_life import offload_memory, offload_mixed
from deltakv.errors import InputError

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

DEFAULT_DIMS = "r1-distill-qwen-7b"
METHODS = ["full", "delta", "stock-static"]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Whose dimensions: a name (r1-distill-qwen-7b, r1-distill-qwen-1.5b, llama-3.1-8b, qwen3-8b, llama-2-7b, "
        "opt-6.7b, opt-13b, tiny), a config.json, or what --model is elsewhere. Weights are random.",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help=f"{options.METHOD_HELP} Also stock-static. Give it several times."),
]
Batch = Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Rows that decode together.")]
Context = Annotated[int, typer.Option("--input-len", "--context", min=1, help="Tokens of each row.")]
Runs = Annotated[int, typer.Option("--num-iters", min=1, help="Timed runs.")]
Warmup = Annotated[int, typer.Option("--num-iters-warmup", min=0, help="Runs before them that do not count.")]
Compiled = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Compile the step in one piece (default: on a GPU).")
]
Dtype = Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on CPU), float32, bfloat16 or float16.")]
Output = Annotated[Path | None, typer.Option("--output-json", "--json", help="Write the results to this JSON file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw this picture (default: beside the JSON, ending in .png).")]


@bench.command()
def step(
    model: Model = DEFAULT_DIMS,
    method: Methods = None,
    batch_size: Batch = 64,
    input_len: Context = 16000,
    spread: Annotated[
        float, typer.Option(min=1, help="Rows evenly from INPUT_LEN / SPREAD to INPUT_LEN tokens; 1: all alike.")
    ] = 1.0,
    num_iters: Runs = 30,
    num_iters_warmup: Warmup = 10,
    finished: Annotated[
        int, typer.Option(min=0, help="So many of the rows have finished, and only keep their place in the batch.")
    ] = 0,
    loop: Annotated[int, typer.Option(min=0, help="Tokens of `generate` to time its loop by; 0: none.")] = 0,
    profile: Annotated[bool, typer.Option(help="Show the kernels of each step (GPU).")] = False,
    compiled: Compiled = None,
    dtype: Dtype = "auto",
    device: options.Device = "auto",
    output_json: Output = None,
    plot: Plot = None,
) -> None:
    """Times one decode step: the model's forward with LM head and argmax, one token a row.

    [bold]Example:[/bold] deltakv bench step --model r1-distill-qwen-7b --batch-size 64 --input-len 16000
    """
    if finished >= batch_size:
        raise InputError(f"--finished {finished} leaves no row of {batch_size} to time; give at most {batch_size - 1}")
    if finished and loop:
        raise InputError("--loop times a `generate` whose rows all go on; give it without --finished")
    if not math.isfinite(spread):
        raise InputError(f"--spread {spread} is not a number of times; give one from 1 on")
    job = Job(model, method or METHODS, device, dtype, output_json, plot)
    if profile and job.device.type != "cuda":
        raise InputError(f"--profile shows the kernels of a GPU, and the device is {job.device.type}; leave it out")
    import torch

    from deltakv.bench.step import Settings, contender
    from deltakv.report import bench as report

    settings = Settings(num_iters, num_iters_warmup, job.compiled(compiled), loop, profile, finished)
    least = max(1, round(input_len / spread))
    lengths = [input_len - (input_len - least) * row // max(1, batch_size - 1) for row in range(batch_size)]
    job.extend_positions(input_len + settings.room)
    span = f"{input_len:,}" if least == input_len else f"{least:,} to {input_len:,}"
    entries = []
    with job.work("step", len(job.methods)) as (made, advance):
        for name, chosen in job.methods:
            advance(name)
            room = input_len + settings.room
            try:
                with contender(made, name, chosen, batch_size, room, compiled=settings.compiled) as one:
                    entries.append(one.measure(lengths, settings))
            except torch.OutOfMemoryError:
                job.leave_out(name)
    job.require(entries)
    results = [entry.numbers(job.bandwidth) for entry in entries]
    title = f"{model}, batch {batch_size}, {span} tokens, {job.dtype_name}, {job.device_name}"
    job.show(report.step_table(results, job.bandwidth), title)
    for result in results if profile else []:
        job.show(report.part_table(result), f"parts of {result['method']}")
        job.show(report.kernel_table(result), f"kernels of {result['method']}")
    job.write({"bench": "step", "compiled": settings.compiled, "spread": spread}, results)
    job.draw(report.step_plot, results, title)


@bench.command()
def op(
    model: Model = DEFAULT_DIMS,
    method: options.OneMethod = options.DEFAULT_METHOD,
    batch_size: Batch = 64,
    input_len: Context = 16000,
    num_iters: Runs = 30,
    num_iters_warmup: Warmup = 10,
    dtype: Dtype = "auto",
    device: options.Device = "auto",
    output_json: Output = None,
) -> None:
    """Times the ops of one layer: attention in each role, scoring, picking.

    [bold]Example:[/bold] deltakv bench op --model r1-distill-qwen-7b --batch-size 1 --input-len 131072
    """
    job = Job(model, [method], device, dtype, output_json, None)
    from deltakv.bench.op import Shape, measure_ops
    from deltakv.bench.random_model import kv_shape
    from deltakv.config import Delta
    from deltakv.report import bench as report

    chosen = job.methods[0][1]
    if not isinstance(chosen, Delta):
        raise InputError(f"bench op measures the ops of delta, and {method!r} has none of its own")
    heads, dim = kv_shape(job.config)
    shape = Shape(batch_size, input_len, job.config.num_attention_heads, heads, dim, job.dtype, job.device)
    job.measure_bandwidth()
    with options.status("timing ops"):
        results = [entry.numbers(job.bandwidth) for entry in measure_ops(shape, chosen, num_iters, num_iters_warmup)]
    title = f"{model}, one layer, batch {batch_size}, {input_len:,} tokens, {job.dtype_name}, {job.device_name}"
    job.show(report.op_table(results, job.bandwidth), title)
    job.write({"bench": "op", "batch": batch_size, "context": input_len, "method": method}, results)


@bench.command()
def sweep(
    model: Model = DEFAULT_DIMS,
    method: Methods = None,
    batch_size: Annotated[str, typer.Option("--batch-size", "--batch", help="With commas between.")] = "1,8,64",
    input_len: Annotated[
        str, typer.Option("--input-len", "--context", help="With commas between.")
    ] = "1024,2048,4096,8192,16384,32768,65536,131072",
    num_iters: Runs = 20,
    num_iters_warmup: Warmup = 5,
    compiled: Compiled = None,
    dtype: Dtype = "auto",
    device: options.Device = "auto",
    output_json: Output = None,
    plot: Plot = None,
) -> None:
    """Times the decode step over contexts and batches: slopes, and from where on sparse pays.

    [bold]Example:[/bold] deltakv bench sweep --batch-size 8 --method full --method delta:min_context=0

    What does not fit the device's memory is left out.
    """
    batches, contexts = options.numbers("--batch-size", batch_size), options.numbers("--input-len", input_len)
    job = Job(model, method or ["full", "delta"], device, dtype, output_json, plot)
    from deltakv.bench.step import Settings
    from deltakv.bench.sweep import sweep as run
    from deltakv.bench.sweep import trends
    from deltakv.report import bench as report

    settings = Settings(num_iters, num_iters_warmup, job.compiled(compiled))
    job.extend_positions(max(contexts) + settings.room)
    with job.work("sweep", len(job.methods) * len(batches)) as (made, advance):
        results: list[dict[str, Any]] = []
        for entry in run(made, job.methods, contexts, batches, settings, advance, job.leave_out):
            results.append(entry.numbers(job.bandwidth))
            # After each: a run that is killed has lost one of them.
            job.write({"bench": "sweep", "compiled": settings.compiled, "trends": trends(results)}, results, say=False)
    job.require(results)
    title = f"{model}, {job.dtype_name}, {job.device_name}"
    job.show(report.sweep_table(results), title)
    found = trends(results)
    job.show(report.trend_table(found), "")
    job.write({"bench": "sweep", "compiled": settings.compiled, "trends": found}, results)
    job.draw(report.sweep_plot, results, title)


@bench.command()
def generate(
    model: Model = DEFAULT_DIMS,
    method: Methods = None,
    batch_size: Batch = 64,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each prompt.")] = 4,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="New tokens a row.")] = 16000,
    dtype: Dtype = "auto",
    device: options.Device = "auto",
    output_json: Output = None,
) -> None:
    """Times a whole `generate` from short prompts to long answers, its loop included.

    [bold]Example:[/bold] deltakv bench generate --batch-size 64 --output-len 16000 --method full --method delta
    """
    job = Job(model, method or ["full", "delta"], device, dtype, output_json, None)
    from deltakv.bench.generation import measure_generation
    from deltakv.report import bench as report

    job.extend_positions(input_len + output_len)
    with job.work("generate", len(job.methods)) as (made, advance):
        entries = measure_generation(made, job.methods, batch_size, input_len, output_len, advance)
        results = [entry.numbers() for entry in entries]
    title = f"{model}, batch {batch_size}, {input_len:,} to {input_len + output_len:,} tokens, {job.device_name}"
    job.show(report.generation_table(results), title)
    job.write({"bench": "generate"}, results)


bench.command()(offload)
bench.command("offload-memory")(offload_memory)
bench.command("offload-mixed")(offload_mixed)
