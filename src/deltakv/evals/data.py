"""Rows of a data set: from a local JSONL file, or from the Hub by name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakv.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub: its name, the configuration, and the split that is asked."""

    name: str
    config: str | None = None
    split: str = "test"


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSONL file, blank lines left out. Raises `InputError` that names the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"the file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the file {path} is not UTF-8 text (byte {error.start})") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                said = getattr(error, "msg", "nested too deeply")
                raise InputError(f"{path}, line {number}: not JSON ({said})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not an object")
            rows.append(row)
    if not rows:
        raise InputError(f"the file {path} is empty; give one question a line, as JSON")
    return rows


def load_rows(source: str, default: HubSet | None) -> list[Row]:
    """The rows of a file, or of a Hub name; `default` says which configuration and split its name means.

    Raises `InputError` if there is no such file and the Hub has no such set or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists() or path.suffix or path.is_absolute() or source.count("/") > 1:
        return read_rows(path)
    known = default if default is not None and default.name == source else HubSet(source)
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(known.name, known.config, split=known.split)]
    except Exception as error:  # the Hub's client fails in as many ways as networks do
        said = " ".join(str(error).split())[:160]
        raise InputError(
            f"cannot load the data set {source!r} from the Hub ({said}); give a JSONL file with --data"
        ) from None


def fingerprint(rows: list[Row]) -> str:
    """16 hex digits of what the rows say."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()[:16]
