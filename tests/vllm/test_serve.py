"""`deltakv serve` up to the moment where vLLM takes over: the command that it builds, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENVIRONMENT


def serve(*arguments: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """before: code that runs first in its process."""
    code = f"import sys; {before}; from deltakv.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", *arguments]
    return subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 2, one line that holds each of `said`, nothing on stdout."""
    assert done.returncode == 2, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("deltakv: ")]
    assert "Traceback" not in done.stderr and not done.stdout
    for words in said:
        assert words in line, line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "8000", "/nowhere"], ("the model comes first",)),
        (["/nowhere"], ("does not exist",)),
        (["smollm2", "--tp-selection", "both"], ("tp_selection='both'", "global, local")),
        (["smollm2", "--method", "quests"], ("unknown method 'quests'",)),
        (["smollm2", "--method", "delta:budget=512", "--budget", "64"], ("twice",)),
    ],
)
def test_refused_without_vllm(arguments: list[str], said: tuple[str, ...]) -> None:
    refused(serve(*arguments, before="sys.modules['vllm'] = None"), *said)


def test_without_vllm_the_extra_is_named(tiny: str) -> None:
    refused(serve(tiny, before="sys.modules['vllm'] = None"), "vllm is not installed", "pip install 'deltakv[vllm]'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nonsense", "3"], ("unrecognized arguments: --nonsense", "vllm serve --help")),
        (["another"], ("a second model",)),
        (["--block-size", "32"], ("--block-size 32", "page_size=16")),
        (["--attention_backend=TRITON_ATTN"], ("TRITON_ATTN does not run deltakv",)),
        (["--additional-config", '{"deltakv": {}}'], ("--method says",)),
        (["--max-model-len", "100000"], ("vLLM refuses this", "max_model_len (100000)")),
        (["--kv-cache-dtype", "fp8"], ("--kv-cache-dtype fp8",)),
        (["--headless"], ("one API server", "--dry-run")),
        (["--api-server-count", "2"], ("one API server", "--api-server-count")),
        (["--grpc"], ("one API server", "leave out --grpc")),
        (["--data-parallel-multi-port-external-lb", "-dp", "2", "-dpl", "2"], ("leave out --data-parallel-multi",)),
        (["--additional-config.other", "1"], ("one JSON object",)),
    ],
)
def test_refused_by_vllm_or_with_it(tiny: str, arguments: list[str], said: tuple[str, ...]) -> None:
    refused(serve(tiny, *arguments), *said)


def test_a_vllm_that_would_not_load_deltakv_is_not_started(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it would serve full attention and say nothing."""
    hidden = "import importlib.metadata as m; m.entry_points = lambda **_: m.EntryPoints()"
    refused(serve(tiny, before=hidden), "would not find deltakv", "pip")
    for allowed in ("others,more", ""):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        refused(serve(tiny), f"VLLM_PLUGINS={allowed} keeps vLLM from loading deltakv", "unset it")
    monkeypatch.setenv("VLLM_PLUGINS", "others,deltakv")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    refused(serve(tiny), "leave out VLLM_USE_RUST_FRONTEND")
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND")
    assert serve(tiny, "--dry-run").returncode == 0


def test_another_vllm_is_refused_before_it_is_asked_for_anything(tiny: str) -> None:
    """It may have moved what the server is made of."""
    moved = "import vllm; vllm.__version__ = '0.33.1'; sys.modules['vllm.engine.arg_utils'] = None"
    refused(serve(tiny, before=moved), "not checked on vLLM 0.33.1", "0.27.1")


def test_no_time_to_shut_down_is_what_was_asked_for(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("shutdown-timeout: 0\n")
    for given in (["--shutdown-timeout", "0"], ["--config", str(tmp_path / "config.yaml")]):
        done = serve(tiny, "--dry-run", *given)
        assert done.returncode == 0 and "--shutdown-timeout 60" not in done.stdout, done.stderr
    assert "--shutdown-timeout 60" in serve(tiny, "--dry-run").stdout


def test_the_command(tiny: str) -> None:
    done = serve(
        tiny, "--method", "delta:page_size=32,sinks=32,plan=FFSRRRRR", "--budget", "512", "--tp-selection", "local",
        "--dry-run", "--port", "8123", "--additional-config", '{"other": 1}', "--shutdown-timeout", "5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert Path(command[0]) == Path(sys.executable)
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", tiny]
    given = dict(zip(command[5::2], command[6::2], strict=True))  # of an option given twice, the last counts
    assert given["--port"] == "8123" and given["--block-size"] == "32" and given["--attention-backend"] == "CUSTOM"
    assert command.count("--shutdown-timeout") == 1 and "--served-model-name" not in command
    assert json.loads(given["--additional-config"]) == {
        "other": 1,
        "deltakv": {
            "algorithm": "delta", "page_size": 32, "plan": "FFSRRRRR", "budget": 512, "recent": 128, "sinks": 32,
            "min_context": 2048, "tp_selection": "local",
        },
    }  # fmt: skip
