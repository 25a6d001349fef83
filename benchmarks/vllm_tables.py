"""Tables of what was measured inside vLLM: benchmarks/vllm_*.py."""

from __future__ import annotations

from typing import Any

from markdown_tables import card_of, commit_of, grid, shown

Found = list[tuple[str, dict[str, Any]]]


def serving(engines: Found, servers: Found, pairs: Found, beside: Found) -> str:
    """All of them, each with its source. Arguments: results by the name of their file."""
    parts = [part for _, data in engines for part in (*engine_tables(data), source(data))]
    parts += [part for _, data in servers for part in (server_table(data), source(data))]
    parts += [part for _, data in pairs for part in (pair_table(data), source(data))]
    parts += [part for _, data in beside for part in (beside_table(data), source(data))]
    return "\n\n".join(parts) or "No run is stored yet."


def engine_tables(data: dict[str, Any]) -> list[str]:
    """One run of vllm_gpu.py: steps, and how exact the answers are."""
    rows = []
    for dims, results in data["parts"].items():
        if dims != "equal" and "stock" in results and "delta" in results:
            for at, stock in enumerate(results["stock"]["shapes"]):
                shapes = {name: result["shapes"][at] for name, result in results.items()}
                step = {name: shape["tpot_ms"] for name, shape in shapes.items()}
                first = shapes["delta"]["ttft_one_prompt_ms"] / stock["ttft_one_prompt_ms"]
                rows.append([f"Qwen2 {dims}", size(stock), f"{step['stock']:.2f}", shown(step.get("full"), "{:.2f}")])
                rows[-1] += [f"{step['delta']:.2f}", f"{step['stock'] / step['delta']:.2f}x", f"{first - 1:+.1%}"]
    headings = "dimensions | rows x context | stock | full attention by deltakv | DELTA | ratio | TTFT, DELTA to stock"
    tables = [grid("**A step of pure decode, ms**, in vLLM's engine", headings, rows)] if rows else []
    if errors := data["parts"].get("equal", {}).get("errors"):
        names = ("stock", "full", "covers", "delta")
        rows = [[f"{row['context']:,}", *(f"{row[name]['mean']:.4f}" for name in names)] for row in errors]
        title = "**Errors of log-probabilities against float32 and full attention**, mean over steps of their largest"
        tables.append(grid(title, "context | stock | full | a budget that covers it | DELTA", rows))
    return tables


def server_table(data: dict[str, Any]) -> str:
    """One run of vllm_server.py."""
    shapes = {row["contender"]: {shape["context"]: shape for shape in row["shapes"]} for row in data["results"]}
    rows = []
    for context, stock in sorted(shapes.get("stock", {}).items()):
        delta = shapes.get("delta", {}).get(context)
        if delta is None:
            continue
        row = [size(stock)]
        for key, form in (("ttft_ms", "{:.1f}"), ("tpot_ms", "{:.2f}"), ("tpot_whole_ms", "{:.2f}")):
            row += [form.format(stock[key]), form.format(delta[key])]
            row.append(f"{delta[key] / stock[key] - 1:+.1%}" if key == "ttft_ms" else f"{stock[key] / delta[key]:.2f}x")
        rows.append(row)
    how = "both servers up, asked in turns" if data["together"] else "one server after the other"
    title = f"**{data['model']}, through the server**, ms: time to the first token of one prompt, time per output token"
    headings = (
        "rows x context | TTFT, stock | DELTA | more | TPOT, stock | DELTA | ratio | TPOT not streamed, stock | DELTA "
        "| ratio"
    )
    return grid(f"{title} ({how})", headings, rows)


def pair_table(data: dict[str, Any]) -> str:
    """One run of vllm_tp.py."""
    equal = data["equal"]
    names = [name for name in ("stock", "delta", "local") if name in equal]
    rows = []
    for at, context in enumerate(equal["stock"]["contexts"]):
        medians = {name: equal[name]["median"][at] for name in names}
        rows.append([f"{context:,}"])
        rows[-1] += [f"{medians[name]:.4f} ({equal[name]['steps'][at]})" for name in names]
        rows[-1].append(f"{medians['delta'] / medians['stock']:.2f}x")
    title = "**Two GPUs against one**: the largest difference of a log-probability, median over steps (how many)"
    return grid(title, "context | " + " | ".join(names) + " | delta to stock", rows)


def beside_table(data: dict[str, Any]) -> str:
    """One run of vllm_beside.py: medians, and how much more than the first contender in the same turn."""
    names = list(dict.fromkeys(name for found in data["results"] for name in found["ms"]))
    words = {"stock": "stock", "full": "full attention by deltakv", "delta": "DELTA", "local": "DELTA, local picks"}
    kinds = {"ttft": "first token", "step": "step"}
    rows = []
    for found in data["results"]:
        model = found["model"].replace("qwen2-", "Qwen2 ") + (f", {found['gpus']} GPUs" if found["gpus"] > 1 else "")
        rows.append([model, kinds[found["what"]], size(found)])
        rows[-1] += [shown(found["ms"][name][1] if name in found["ms"] else None, "{:.2f}") for name in names]
        low, middle, high = found["more"]["delta"]
        rows[-1] += [f"{middle:+.1%}", f"{low:+.1%} to {high:+.1%}"]
    title = "**Engines up at once, asked in turns**, ms, medians; how much more DELTA takes in the same turn"
    headings = ["dimensions", "what", "rows x context", *(words[name] for name in names), "more", "middle half"]
    return grid(title, " | ".join(headings), rows)


def size(shape: dict[str, Any]) -> str:
    return f"{shape['rows']} x {shape['context']:,}"


def source(data: dict[str, Any]) -> str:
    """Where a run was measured."""
    versions, cards = data["versions"], len(data["machine"].get("gpus", [])) or 1
    software = f"vLLM {versions['vllm']}, torch {versions['torch']}"
    where = f"{data['date'][:10]}, {f'{cards} x ' if cards > 1 else ''}{card_of(data)}, {data['dtype']}"
    return f"<sub>{where}, {software}, commit {commit_of(data)}</sub>"
