"""The C++ ops: where they come from, what happens where they cannot, and what they refuse.

That they compute the right thing is held by the tests of their ops, which run them as what is registered.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from paged_inputs import make_paged

from deltakv import ops
from deltakv.errors import UnsupportedUseError
from deltakv.ops import native
from deltakv.ops.decode_attention import flash
from deltakv.ops.decode_attention import native as attention
from deltakv.ops.page_scores import native as scores

#: Outside CI a machine without a compiler is a machine that these tests are not about.
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or os.environ.get("CI")), reason="no C++ compiler here"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, no wish, and nothing loaded yet; afterwards all as before."""
    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DELTAKV_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    yield tmp_path / "cache"
    native.library.cache_clear()


def compiler_that(tmp_path: Path, does: str) -> str:
    """A program that stands in for a compiler."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_compiled_once_into_the_cache_folder(fresh: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is not None and native.running() == "C++"
    (made,) = fresh.iterdir()
    assert made.suffix == ".so", "one file, and nothing of the compilation left beside it"
    written = made.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [file.stat().st_mtime_ns for file in fresh.iterdir()] == [written]


@needs_compiler
def test_only_torchs_own_threads(fresh: Path) -> None:
    """Linked to no OpenMP runtime: its symbols are those of the one that torch has loaded."""
    native.build()
    (made,) = fresh.iterdir()
    assert b"libgomp" not in made.read_bytes() and b"libomp" not in made.read_bytes()


@needs_compiler
def test_another_compiler_or_source_is_another_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("c++") or ""
    own = compiler_that(fresh.parent, f'exec {real} "$@"')
    monkeypatch.setenv("CXX", f"{own} -DNOTHING")  # with an option, as wrappers have them
    native.build()
    monkeypatch.delenv("CXX")
    native.build()
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
def test_what_is_compiled_needs_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.build()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert native.library() is not None


@needs_compiler
def test_a_broken_library_is_made_anew(fresh: Path) -> None:
    made = fresh / f"ops-{native._key()}.so"
    fresh.mkdir()
    made.write_bytes(b"half a fi")
    assert native.library() is not None and made.stat().st_size > 1000


@pytest.mark.parametrize(
    "does, why",
    [
        ('echo "no such header" >&2; exit 1', "no such header"),
        ('case "$*" in *-shared*) exit 3;; esac', "failed to link"),
        ('case "$*" in *-shared*) echo rubbish > "${5}";; esac', "cannot be made or loaded"),
    ],
)
def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch, does: str, why: str) -> None:
    monkeypatch.setenv("CXX", compiler_that(fresh.parent, does))
    with pytest.warns(RuntimeWarning, match=rf"PyTorch's own kernels.*{why}.*DELTAKV_NATIVE=0"):
        assert native.library() is None
    assert native.running() == "PyTorch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        batch = make_paged([5, 40, 700], head_dim=64)
        assert torch.equal(ops.decode_attention(*batch.arguments), flash.decode_attention(*batch.arguments))


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler"):
        assert native.library() is None
    native.library.cache_clear()
    monkeypatch.setenv("DELTAKV_NATIVE", "1")
    with pytest.raises(UnsupportedUseError, match=r"DELTAKV_NATIVE=1, but there is no C\+\+ compiler"):
        native.library()


def test_a_cache_folder_that_cannot_be_made(fresh: Path) -> None:
    fresh.write_text("a file is in its place")
    with pytest.warns(RuntimeWarning, match="cannot be made or loaded"):
        assert native.library() is None


def test_pytorch_on_request(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAKV_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
    assert not fresh.exists()
    native.library.cache_clear()
    monkeypatch.setenv("DELTAKV_NATIVE", "yes")
    with pytest.raises(UnsupportedUseError, match="neither 0"):
        native.library()


@needs_compiler
def test_registered_ops_run_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the PyTorch versions out of the way."""
    monkeypatch.delattr(flash, "decode_attention")
    monkeypatch.delattr(flash, "decode_attention_stats")
    monkeypatch.delattr(scores.by_length, "page_scores")
    for dtype in (torch.float32, torch.bfloat16):
        batch = make_paged([5, 40, 700], head_dim=64, dtype=dtype)
        assert ops.decode_attention(*batch.arguments).isfinite().all()
        _, *softmax = ops.decode_attention_stats(*batch.arguments)
        assert ops.page_scores(*softmax, batch.seq_lens[:, 0], 16).isfinite().all()


def test_other_dtypes_and_layouts_run_in_pytorch() -> None:
    for dtype in (torch.float16, torch.float64):
        batch = make_paged([5, 40, 300], head_dim=64, dtype=dtype)
        assert attention._library(batch.k_cache, batch.v_cache) is None
        wide = make_paged([5, 40, 300], head_dim=64, dtype=torch.float32)
        got, want = ops.decode_attention(*batch.arguments), ops.decode_attention(*wide.arguments)
        torch.testing.assert_close(got.float(), want, rtol=0, atol=5e-3)
    batch = make_paged([5, 40, 300], head_dim=64)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (batch.k_cache, batch.v_cache)]
    got = ops.decode_attention(batch.q, *turned, *batch.arguments[3:])
    torch.testing.assert_close(got, ops.decode_attention(*batch.arguments), rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("page", [-1, 10**6])
def test_a_page_that_is_not_there(page: int) -> None:
    batch = make_paged([5, 40, 700], head_dim=64)
    batch.block_table[2, 0, 33] = page
    with pytest.raises(IndexError, match="names a page that the cache, of"):
        ops.decode_attention(*batch.arguments)


@needs_compiler
def test_more_tokens_than_the_table_has_room_for() -> None:
    batch = make_paged([5, 40, 700], head_dim=64, extra_width=0)
    batch.seq_lens[1, 0] = 705
    with pytest.raises(IndexError, match="room for 704"):
        ops.decode_attention(*batch.arguments)
    with pytest.raises(IndexError, match="logits of 32"):
        ops.page_scores(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4), torch.zeros(1, 4), torch.tensor([33]), 16)


@needs_compiler
def test_the_two_sides_agree_on_the_call() -> None:
    """Fields in the order of native.cpp, and its segment."""
    source = (Path(attention.__file__).parent / "native.cpp").read_text()
    struct = source.partition("struct Call {")[2].partition("};")[0]
    plain = " ".join(line.partition("//")[0] for line in struct.splitlines())
    names = [name.split(" ")[-1].strip("*") for field in plain.split(";") if field.strip() for name in field.split(",")]
    assert names == [name for name, _ in attention._Call._fields_]
    assert f"SEGMENT = {attention._SEGMENT};" in source
    assert ctypes.sizeof(attention._Call) % 8 == 0


@needs_compiler
def test_threads_change_no_bit() -> None:
    batch = make_paged([300, 17, 1100, 2100, 1025], head_dim=64, n_heads=8, n_kv=2)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, *softmax = ops.decode_attention_stats(*batch.arguments)
        results.append((out, *softmax, ops.page_scores(*softmax, batch.seq_lens[:, 0], 16)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_whole_process_without_a_compiler(tmp_path: Path) -> None:
    """The warning is one that a user sees, and the result is right."""
    code = """
import torch
from deltakv import ops
q, kv = torch.randn(1, 4, 64), torch.randn(3, 16, 2, 64)
table, lens = torch.tensor([[[2, 0, 1]]], dtype=torch.int32), torch.tensor([[40]], dtype=torch.int32)
out = ops.decode_attention(q, kv, kv, table, lens, 0.125, None)
k = kv[[2, 0, 1]].flatten(0, 1)[:40].transpose(0, 1)[None]
want = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, k, scale=0.125, enable_gqa=True)[:, :, 0]
print("right" if torch.allclose(out, want, atol=1e-5) else "wrong")
"""
    environment = {
        **os.environ,
        "PATH": str(tmp_path),
        "DELTAKV_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": ":".join(sys.path),
    }
    for name in ("CXX", "DELTAKV_NATIVE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "right", done.stderr
    assert done.stderr.count("no C++ compiler") == 1
