"""The tables of `deltakv bench offload`, `offload-memory` and `offload-mixed`, for `tables.py`."""

from __future__ import annotations

from typing import Any

from markdown_tables import grid


def offload_table(data: dict[str, Any], name: str = "", picture: str = "") -> str:
    """One run of `bench offload`: every variant beside the overlapped transfer of all K and V, and beside what was
    predicted of it. name: of its file, which ends with what else went on in the machine (`-beside-two-evaluations`).
    picture: where it is, if there is one."""
    results = data["results"]
    plain = next((row["step_seconds"] for row in results if row["variant"] == "overlapped"), None)
    rows = []
    for row in results:
        seconds, forecast = row["step_seconds"], row["forecast"]
        if seconds is None:
            rows.append([row["variant"], row["failed"].split(":")[0], *[""] * 7])
            continue
        rows.append(
            [
                row["variant"],
                f"{1e3 * seconds:,.1f}",
                f"{plain / seconds:.2f}x" if plain else "",
                f"{1e3 * row['predicted_seconds']:,.1f}" if forecast else "",
                f"{row['measured_to_predicted'] - 1:+.0%}" if forecast else "",
                f"{forecast['share']:.0%}" if forecast else "",
                f"{row['moved_bytes_per_s'] / 1e9:.1f}" if row["moved_bytes_per_s"] else "",
                f"{row['share_of_bus']:.0%}" if row["share_of_bus"] else "",
                "" if row["gpu_busy"] is None else f"{row['gpu_busy']:.0%}",
            ]
        )
    batch = f"batch {data['batch']}"
    if data["batches"] > 1:
        batch = f"{data['batches']} batches of {data['batch']}, weights in host memory"
    title = f"**{_model(data)}, {batch}, {data['context']:,} tokens**"
    if "-beside-" in name:
        title += f", beside {name.split('-beside-')[1].replace('-', ' ')}"
    if picture:
        title += f" ([picture]({picture}))"
    headings = (
        "variant | ms a step | to overlapped | predicted, ms | off by | recomputed | GB/s | of the bus | GPU busy"
    )
    return grid(title, headings, rows)


def rates(data: dict[str, Any]) -> str:
    """P and F that a run's predictions rest on, measured in it, and how fast its memory was page-locked."""
    found = [row["forecast"]["rates"] for row in data["results"] if row["forecast"]]
    if not found:
        return ""
    text = f", bus {found[0]['bus'] / 1e9:.1f} GB/s, recomputing {found[0]['gemm'] / 1e12:,.0f} TFLOP/s"
    if data["pin_seconds"]:
        text += f", page-locking {data['pinned_bytes'] / data['pin_seconds'] / 1e9:.1f} GB/s"
    return text


def memory_table(data: dict[str, Any]) -> str:
    """One run of `bench offload-memory`."""
    first = data["results"][0]["decode_peak"] or 1
    rows = [
        [
            f"{row['length']:,}",
            f"{row['decode_peak'] / 2**20:,.1f}",
            f"{row['decode_peak'] / first - 1:+.1%}",
            f"{row['prefill_peak'] / 2**20:,.1f}",
            f"{row['host_bytes'] / 2**20:,.0f}",
        ]
        for row in data["results"]
    ]
    title = f"**{_model(data)}, batch {data['batch']}, {data['recompute']:.0%} recomputed**: memory"
    headings = "tokens | a step on the device, MiB | to the first | a chunk of the prompt, MiB | on the host, MiB"
    return grid(title, headings, rows)


def mixed_table(data: dict[str, Any]) -> str:
    """One run of `bench offload-mixed`: the first rounds and the last."""
    rounds = data["results"]
    shown = [*rounds[:2], rounds[len(rounds) // 2], rounds[-1]] if len(rounds) > 4 else rounds
    rows = [
        [
            f"{row['seconds'] / 60:.1f}",
            f"{row['requests']:,}",
            *(f"{row[what] / 2**20:,.0f}" for what in ("rss", "pinned", "device")),
        ]
        for row in shown
    ]
    title = f"**{_model(data)}, {rounds[-1]['requests']:,} mixed requests**: what is held after them"
    return grid(title, "minutes | requests | process, MiB | page-locked, MiB | on the device, MiB", rows)


def _model(data: dict[str, Any]) -> str:
    return f"{data['model']}, {data['layers']} layers"
