"""The client that times vLLM's server: events are told apart however they arrive."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from vllm_http import Server, ServerError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices":[{"text":"data: "}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3}}\n\ndata: [DONE]\n\n'


def answering(*pieces: bytes) -> Server:
    """A server that answers one request with these pieces, a while apart, and closes."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        caller, _ = listening.accept()
        while b"}" not in caller.recv(1 << 16):
            pass
        for piece in pieces:
            caller.sendall(piece)
            time.sleep(0.02)
        caller.close()
        listening.close()

    threading.Thread(target=serve, daemon=True).start()
    server = Server.__new__(Server)
    server.port, server.log = listening.getsockname()[1], Path("/dev/null")
    return server


def test_events_are_counted_however_they_arrive() -> None:
    """One in two pieces, two in one piece; the one with the usage has no token."""
    (answer,) = answering(HEAD, TOKEN[:4], TOKEN[4:] + TOKEN, TOKEN, USAGE).ask([[1, 2]], 3, streamed=True)
    assert answer.tokens == 3 and len(answer.times) == 3
    assert answer.times[0] == answer.times[1] <= answer.times[2]


def test_an_answer_that_is_not_streamed_has_one_time() -> None:
    whole = b'HTTP/1.1 200 OK\r\n\r\n{"usage":{"prompt_tokens":2,"completion_tokens":3}}'
    (answer,) = answering(whole).ask([[1, 2]], 3, streamed=False)
    assert answer.tokens == 3 and len(answer.times) == 1


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"error":"too long"}'), "400 Bad Request: .*too long"),
        ((HEAD, TOKEN), "without its usage"),
        ((HEAD, TOKEN, USAGE.replace(b'tokens":3}', b'tokens":2}')), r"\[2\] tokens in place of 3"),
    ],
)
def test_wrong_answers_are_told(pieces: tuple[bytes, ...], said: str) -> None:
    with pytest.raises(ServerError, match=f"(?s){said}"):
        answering(*pieces).ask([[1, 2]], 3, streamed=True)
