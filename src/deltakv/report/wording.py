"""What results say in a sentence, and in a table: the words of the page that shows them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from deltakv.report.plots import KL_FLOOR
from deltakv.report.results import Entry

#: What attends to everything.
DENSE = ("full", "stock", "stock-static")


def is_dense(entry: Entry) -> bool:
    return str(entry["method"]).split(":")[0] in DENSE


def answers_headline(results: Sequence[Entry]) -> str:
    sparse = [result for result in results if not is_dense(result) and result["versus"]]
    if not sparse:
        return ""
    if "perplexity" in results[0]:
        best = min(sparse, key=lambda result: result["perplexity"])
        said = f"{best['versus']['ratio']:.3f} times {best['versus']['method']}'s perplexity"
    else:
        best = max(sparse, key=lambda result: (result["accuracy"], -(result["attended_tokens"] or 0)))
        low, high = best["versus"]["interval"]
        said = f"{best['versus']['difference']:+.1%} against {best['versus']['method']} ({low:+.1%} to {high:+.1%})"
    fewer = (
        f", attending to {best['full_tokens'] / best['attended_tokens']:.2f}x fewer tokens"
        if best["full_tokens"]
        else ""
    )
    return f"{best['method']}: {said}{fewer}"


def fidelity_headline(group: Sequence[Entry]) -> str:
    sparse = [entry for entry in group if not is_dense(entry) and entry["kl_mean"] > KL_FLOOR]
    if not sparse:
        return ""
    best = min(sparse, key=lambda entry: entry["kl_mean"])
    return f"Nearest to full attention: {best['method']}, mean KL {best['kl_mean']:.3g} nats"


def steps_headline(group: Sequence[Entry]) -> str:
    longest = max(entry["context"] for entry in group)
    here = [entry for entry in group if entry["context"] == longest]
    dense, sparse = ([e for e in here if is_dense(e) == kind] for kind in (True, False))
    if not dense or not sparse:
        return ""
    fastest, best = min(sparse, key=lambda e: e["step_ms"]), min(dense, key=lambda e: e["step_ms"])
    ratio = best["step_ms"] / fastest["step_ms"]
    against = f"{best['method']}, the best full attention"
    return f"{fastest['method']} steps {ratio:.2f}x as fast as {against}, at {longest:,} tokens"


def answers_table(results: Sequence[Entry]) -> str:
    texts = "perplexity" in results[0]

    def row(result: Entry) -> list[str]:
        versus, attended = result["versus"], result["attended_tokens"]
        form = "{:.3f}" if texts else "{:.1%}"
        cells = [result["method"], _span(result["perplexity" if texts else "accuracy"], result["interval"], form)]
        if versus:
            value, form = (versus["ratio"], "{:.4f}") if texts else (versus["difference"], "{:+.1%}")
            cells.append(_span(value, versus["interval"], form))
        else:
            cells.append("")
        cells += [
            f"{attended:,.0f}" if attended else "",
            f"{result['full_tokens'] / attended:.2f}x" if attended else "",
        ]
        if not texts:
            p = versus["p"] if versus else None
            cells += [f"{versus['better']}/{versus['worse']}" if versus else "", chance(p)]
            cells += [f"{result['new_tokens']:,.0f}", str(result["truncated"])]
        return [*cells, f"{result['seconds']:,.0f}"]

    base = next((result["versus"]["method"] for result in results if result["versus"]), "full")
    heads = ["method", "perplexity" if texts else "accuracy", f"to {base}", "attended", "fewer"]
    heads += [] if texts else ["better/worse", "p", "new tokens", "cut off"]
    return table([*heads, "seconds"], map(row, results))


def fidelity_table(group: Sequence[Entry]) -> str:
    def row(entry: Entry) -> list[str]:
        cells = [entry["method"], f"{entry['attended_tokens']:,.0f}", f"{entry['kl_mean']:.4f}"]
        for name, form in (("kl_p99", "{:.3f}"), ("top1", "{:.1%}"), ("perplexity", "{:.2f}")):
            cells.append(form.format(entry[name]) if entry.get(name) is not None else "")
        return cells

    return table(["method", "attended", "mean KL", "p99 KL", "top-1", "perplexity"], map(row, group))


def steps_table(group: Sequence[Entry]) -> str:
    ordered = sorted(group, key=lambda entry: (entry["context"], entry["step_ms"]))
    rows = ([entry["method"], f"{entry['context']:,}", f"{entry['step_ms']:.3f}"] for entry in ordered)
    return table(["method", "context", "ms a step"], rows)


def _span(value: float, interval: Sequence[float], form: str) -> str:
    return f"{form.format(value)} ({' to '.join(form.format(end) for end in interval)})"


def chance(p: float | None) -> str:
    """Of a test."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-head="{escape(head)}">{escape(cell)}</td>' for head, cell in zip(heads, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
