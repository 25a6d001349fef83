"""Tables in Markdown, and what stands below them."""

from __future__ import annotations

from typing import Any


def card_of(data: dict[str, Any]) -> str:
    """The GPU's name in short."""
    name: str = data["device"]
    return name.removeprefix("NVIDIA ").split()[0]


def grid(title: str, headings: str, rows: list[list[str]]) -> str:
    """A Markdown table. headings: with bars between."""
    lines = [title, "", f"| {headings} |", "|---" * (headings.count("|") + 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def shown(value: float | None, form: str) -> str:
    """Nothing for None."""
    return "" if value is None else form.format(value)


def commit_of(data: dict[str, Any]) -> str:
    """In short; that there were changes on top is not left out."""
    commit, _, changes = (data["commit"] or "unknown").partition("+")
    return commit[:9] + (f" and {changes}" if changes else "")
