"""`deltakv plan`: what a decode step of a model will read, before anything but its config is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltakv.cli import options
from deltakv.cli.checks import check_methods
from deltakv.errors import InputError

ROLE_NAMES = {"F": "FULL", "S": "SELECT (Δ)", "R": "REUSE", "window": "sliding window"}


def plan(
    model: options.Model = options.DEFAULT_MODEL,
    method: options.OneMethod = options.DEFAULT_METHOD,
    context: Annotated[str, typer.Option(help="Lengths in tokens, with commas between.")] = "4000,8000",
    batch: Annotated[int, typer.Option(min=1, help="Rows that decode together.")] = 1,
    json_file: options.Json = None,
    dtype: options.Dtype = "auto",
) -> None:
    """Shows a model's layers, their roles, the bytes a decode step reads and the predicted saving.

    [bold]Example:[/bold] deltakv plan --method delta:budget=1024 --context 4000,8000 --batch 8

    Only the model's config is loaded.
    """
    chosen = options.parse_method(method)
    options.check_output(json_file)
    lengths = options.numbers("--context", context)

    from deltakv.bench.floors import step_cost
    from deltakv.bench.provenance import provenance
    from deltakv.integrations.hf.support import model_shape
    from deltakv.loading import check_length
    from deltakv.report.tables import plan_table, print_table

    def check(config: Any) -> None:
        for length in lengths:
            check_length(length, config, f"--context {length}")

    config = check_methods(model, [chosen], check)
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
