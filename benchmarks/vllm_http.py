"""A server process on loopback, and the least client that can time its answers: plain sockets, so that what is timed is
the server and not a library."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What an answer says of its tokens; each event of a stream says how many there are by then.
COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
#: No answer takes longer.
ANSWER_SECONDS = 240.0


class ServerError(Exception):
    """A server that does not start, or answers with an error; says which, and what it logged last."""


@dataclass
class Answer:
    """times: seconds from the request to each event with new tokens; to the end alone if not streamed.
    counts: tokens by then; an event has several where the server falls behind."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class Server:
    """The process, in a session of its own so that its children end with it, and where it listens."""

    def __init__(self, command: list[str], port: int, environment: dict[str, str], log: Path) -> None:
        self.port, self.log, self._began = port, log, time.monotonic()
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float) -> float:
        """Until it answers. Returns how long that took since the start; raises `ServerError`."""
        while time.monotonic() - self._began < seconds:
            if self._process.poll() is not None:
                raise ServerError(f"exit code {self._process.returncode} at start\n{self.last_words()}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return time.monotonic() - self._began
            time.sleep(0.25)
        raise ServerError(f"not up after {seconds:.0f} s\n{self.last_words()}")

    def last_words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-2500:]

    def stop(self) -> None:
        """With all its children."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(8)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def counters(self) -> dict[str, float]:
        """What the metrics endpoint counts of prefix cache, preemptions and sparse steps; blocks of the KV cache.

        Raises `ServerError`.
        """
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
                text = page.read().decode()
        except OSError as error:
            raise ServerError(f"{error}\n{self.last_words()}") from None
        found = {
            name.removeprefix("vllm:"): float(value)
            for name, value in re.findall(
                r"^((?:vllm:prefix_cache_|vllm:num_preemptions|deltakv_)\w*_total)(?:\{.*\})? (\S+)$", text, re.M
            )
        }
        blocks = re.search(r'num_gpu_blocks="(\d+)"', text)
        return {**found, "blocks": float(blocks[1]) if blocks else 0.0}

    def ask(self, prompts: list[list[int]], tokens: int, streamed: bool) -> list[Answer]:
        """All prompts at once, each answered with so many tokens. Raises `ServerError`."""

        async def all_of_them() -> list[Answer]:
            bodies = [_body(prompt, tokens, streamed) for prompt in prompts]
            return await asyncio.gather(*(_answer(self.port, body) for body in bodies))

        try:
            answers = asyncio.run(asyncio.wait_for(all_of_them(), ANSWER_SECONDS))
        except (TimeoutError, OSError) as error:
            raise ServerError(f"{type(error).__name__}: {error}\n{self.last_words()}") from None
        found = [answer.counts[-1] for answer in answers]
        if any(count != tokens for count in found):
            raise ServerError(f"{found} tokens in place of {tokens}\n{self.last_words()}")
        return answers


def _body(prompt: list[int], tokens: int, streamed: bool) -> bytes:
    asked: dict[str, Any] = {
        "model": "random", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": streamed,
    }  # fmt: skip
    if streamed:
        asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return json.dumps(asked).encode()


async def _answer(port: int, body: bytes) -> Answer:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    began = time.perf_counter()
    writer.write(head.encode() + body)
    await writer.drain()
    seen, reads = bytearray(), []  # looked through when all is there: nothing waits for that
    try:
        status = await reader.readline()
        while data := await reader.read(1 << 16):
            seen += data
            reads.append((len(seen), time.perf_counter() - began))
    finally:
        writer.close()
    if b" 200 " not in status:
        raise ServerError(f"{status.decode().strip()}: {seen[-600:].decode(errors='replace')}")
    answer = Answer()
    for found in COUNT.finditer(seen):
        if (count := int(found[1])) > (answer.counts[-1] if answer.counts else 0):
            answer.counts.append(count)
            answer.times.append(reads[bisect.bisect_left(reads, (found.end(), 0.0))][1])
    if not answer.counts:
        raise ServerError(f"an answer that does not count its tokens: {seen[-600:].decode(errors='replace')}")
    return answer
