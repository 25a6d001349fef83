"""What is on the disk after a kill at any byte, and what the next process makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltakv.errors import InputError
from deltakv.evals.journal import Answer, Answered, Journal, file_name, write_whole

HEADER = {"method": "full", "questions": "0123"}
BATCHES = [Answered(n, [Answer(2 * n, 5, 3, "zwölf\n"), Answer(2 * n + 1, 5, 2)], 5, 50, 60, 0.5, 7) for n in range(2)]


def filled(path: Path) -> Journal:
    journal = Journal(path, HEADER, {"machine": "m"})
    for batch in BATCHES:
        journal.add(batch)
    return journal


def test_read_again(tmp_path: Path) -> None:
    path = tmp_path / "full.jsonl"
    journal = filled(path)
    again = Journal(path, HEADER)
    assert again.batches == journal.batches == {0: BATCHES[0], 1: BATCHES[1]}
    assert again.notes == {"machine": "m"} and sorted(again.answers) == [0, 1, 2, 3]


def test_torn_at_any_byte(tmp_path: Path) -> None:
    """Whole lines stay, the rest goes, and the file ends as if nothing had happened."""
    path = tmp_path / "full.jsonl"
    filled(path)
    data = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        journal = Journal(path, HEADER, {"machine": "m"})
        whole = sum(end <= cut for end in ends)
        assert list(journal.batches) == list(range(max(whole - 1, 0)))
        for batch in BATCHES[len(journal.batches) :]:
            journal.add(batch)
        assert path.read_bytes() == data


def test_who_only_reads_begins_no_file(tmp_path: Path) -> None:
    """A first line that was torn is written by who knows all of it: less would be another run's to the next process."""
    path = tmp_path / "full.jsonl"
    filled(path)
    first = path.read_bytes().index(b"\n")
    for cut in range(first + 1):
        path.write_bytes(b"{" * cut)
        assert not Journal(path, {"method": "full"}, begins=False).answers
        assert path.read_bytes() == b""
        assert not Journal(path, HEADER).answers and path.read_bytes().endswith(b"\n")
    filled(path)
    assert len(Journal(path, {"method": "full"}, begins=False).answers) == 4


def test_damage_in_the_middle_is_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "full.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(InputError, match="line 2: damaged"):
        Journal(path, HEADER)


@pytest.mark.parametrize(("name", "value"), [("method", "delta"), ("questions", "9")])
def test_another_runs_journal_is_refused(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "full.jsonl"
    filled(path)
    with pytest.raises(InputError, match=f"{name} .* and this run has '{value}'; give another --out"):
        Journal(path, {**HEADER, name: value})


def test_a_batch_that_is_answered_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "full.jsonl"
    filled(path).add(replace(BATCHES[1], seconds=9))
    assert Journal(path, HEADER).batches[1].seconds == 9


def test_names_of_files() -> None:
    assert file_name("delta:budget=512,sinks=0") == "delta-budget-512-sinks-0"
    long = [file_name(f"delta:plan={'FS' + 'R' * 90}{end}") for end in "RS"]
    assert long[0] != long[1] and max(map(len, long)) <= 80


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_on_the_disk_before_the_next_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show this, a power cut would: every line is synced, and at the first one its folder too."""
    import os

    path = tmp_path / "full.jsonl"
    synced = []

    def sync(handle: int) -> None:
        synced.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else path.stat().st_size)

    monkeypatch.setattr(os, "fsync", sync)
    journal = Journal(path, HEADER)
    sizes = [path.stat().st_size]
    for batch in BATCHES:
        journal.add(batch)
        sizes.append(path.stat().st_size)
    assert synced == [sizes[0], "folder", *sizes[1:]]
