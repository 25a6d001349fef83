"""A server that `deltakv serve smollm2` has started, and a real client: the `openai` package on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from harness import ENVIRONMENT

LIMIT = 1024
#: Long enough that what follows is decoded sparsely: see `--method` below.
STORY = "The lighthouse keeper wrote down the weather, the ships and the birds of every day. " * 16

pytestmark = pytest.mark.model


class Server:
    """The process, and where it listens."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "deltakv", "serve", "smollm2"),
            *("--method", "delta:budget=128,recent=32,min_context=128"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(LIMIT)),
            *("--dtype", "float32", "--enforce-eager"),
        ]
        environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """With its engine, which would outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def alone(self) -> bool:
        """Whether nothing that the server started is left."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=240)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For all tests here; the last one stops it."""
    running = Server(tmp_path_factory.mktemp("server") / "log")
    try:
        running.wait(240)
        yield running
    finally:
        running.kill()


def test_chat(server: Server) -> None:
    answer = server.client().chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": f"{STORY}\nWho wrote down the weather?"}],
        max_tokens=16,
        temperature=0,
    )
    assert "keeper" in (answer.choices[0].message.content or "")
    assert answer.usage is not None and answer.usage.prompt_tokens > 256


def test_streaming_gives_what_waiting_gives_and_stop_stops(server: Server) -> None:
    client = server.client()
    whole = client.completions.create(model="smollm2", prompt=STORY, max_tokens=12, temperature=0).choices[0]
    parts = client.completions.create(model="smollm2", prompt=STORY, max_tokens=12, temperature=0, stream=True)
    streamed = [part.choices[0].text for part in parts]
    assert len(streamed) > 4 and "".join(streamed) == whole.text
    word = whole.text.split()[3]
    stopped = client.completions.create(model="smollm2", prompt=STORY, max_tokens=12, temperature=0, stop=[word])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole.text[: whole.text.index(word)]


def test_logprobs(server: Server) -> None:
    choice = server.client().completions.create(
        model="smollm2", prompt=STORY, max_tokens=4, temperature=0, logprobs=3
    ).choices[0]  # fmt: skip
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == 4 and all(value <= 0 for value in choice.logprobs.token_logprobs)
    for chosen, best in zip(choice.logprobs.tokens or [], choice.logprobs.top_logprobs or [], strict=True):
        assert chosen == max(best, key=best.__getitem__)


def test_sixteen_requests_at_once_get_what_each_gets_alone(server: Server) -> None:
    client = server.client()

    def complete(number: int) -> str:
        prompt = f"{STORY[: 900 + 40 * (number % 8)]} Day {number % 8}:"
        return client.completions.create(model="smollm2", prompt=prompt, max_tokens=6, temperature=0).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(complete, range(16)))
    assert together[:8] == together[8:]
    assert together[:2] == [complete(0), complete(1)]


def test_a_cancelled_request_leaves_the_server_at_work(server: Server) -> None:
    client = server.client()
    parts = client.completions.create(
        model="smollm2", prompt=STORY, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(parts))
    parts.close()
    deadline = time.monotonic() + 60
    while running_requests(server) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert running_requests(server) == 0
    assert client.completions.create(model="smollm2", prompt="Hello", max_tokens=2).choices[0].text


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def running_requests(server: Server) -> float:
    return metric(server, "vllm:num_requests_running")


def test_the_metrics_endpoint_shows_how_sparse_it_was(server: Server) -> None:
    names = ("decode_rows", "sparse_rows", "picks", "attended_tokens", "full_tokens")
    before = [metric(server, f"deltakv_{name}_total") for name in names]
    answer = server.client().completions.create(
        model="smollm2", prompt=STORY, max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
    )
    rows, sparse, picks, attended, full = (
        metric(server, f"deltakv_{name}_total") - old for name, old in zip(names, before, strict=True)
    )
    assert answer.usage is not None
    first = answer.usage.prompt_tokens + 1
    lengths = range(first, first + 3)  # the prompt's own forward gives the first of the four tokens
    kept = [128 - 16 + (length - 1) % 16 + 1 for length in lengths]  # the last of eight pages is partly filled
    assert (rows, sparse, picks) == (3, 3, 3 * 3)
    assert full == 30 * sum(lengths)
    assert attended == 5 * sum(lengths) + 25 * sum(kept)


def test_a_prompt_over_the_limit_is_a_400_that_says_so(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().completions.create(model="smollm2", prompt=STORY * 4, max_tokens=4)
    assert refused.value.status_code == 400 and str(LIMIT) in str(refused.value)


def test_sigterm_during_a_request_lets_it_finish(server: Server) -> None:
    """The last test: it stops the server."""
    client = server.client()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            client.completions.create,
            model="smollm2", prompt=STORY, max_tokens=48, temperature=0, extra_body={"ignore_eos": True},
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not running_requests(server) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not answer.done() and time.monotonic() < deadline, "no request was seen running"
        server.process.send_signal(signal.SIGTERM)
        completed = answer.result(120)
    assert completed.choices[0].finish_reason == "length"
    assert server.process.wait(120) == 0
    deadline = time.monotonic() + 30
    while not server.alone() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.alone(), "the engine has outlived the server"
