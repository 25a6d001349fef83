"""What the tables of results share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def grid(title: str, headings: str, rows: list[list[str]]) -> str:
    """A Markdown table. headings: with bars between."""
    lines = [title, "", f"| {headings} |", "|---" * (headings.count("|") + 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def commit(data: dict[str, Any]) -> str:
    """In short; that there were changes on top is not left out."""
    commit, _, changes = (data["commit"] or "unknown").partition("+")
    return commit[:9] + (f" and {changes}" if changes else "")
