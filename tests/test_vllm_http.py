"""The client that times vLLM's server: events are told apart however they arrive."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from vllm_http import Answer, Server, ServerError
from vllm_server import per_token

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3}}\n\ndata: [DONE]\n\n'


def token(count: int) -> bytes:
    return b'data: {"choices":[{"text":""}],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n' % count


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


def test_tokens_are_counted_however_they_arrive() -> None:
    """One in two pieces, two in one piece, two in one event; the one with the usage alone is no token."""
    pieces = (HEAD, token(1)[:-6], token(1)[-6:] + token(2), token(4), USAGE.replace(b"3}", b"4}"))
    (answer,) = answering(*pieces).ask([[1, 2]], 4, streamed=True)
    assert answer.counts == [1, 2, 4]
    assert answer.times[0] == answer.times[1] <= answer.times[2]


def test_an_answer_that_is_not_streamed_has_one_time() -> None:
    whole = b'HTTP/1.1 200 OK\r\n\r\n{"usage":{"prompt_tokens":2,"completion_tokens":3}}'
    (answer,) = answering(whole).ask([[1, 2]], 3, streamed=False)
    assert answer.counts == [3] and len(answer.times) == 1


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"error":"too long"}'), "400 Bad Request: .*too long"),
        ((HEAD, b'data: {"choices":[]}\n\n'), "does not count its tokens"),
        ((HEAD, token(1), token(2)), r"\[2\] tokens in place of 3"),
    ],
)
def test_wrong_answers_are_told(pieces: tuple[bytes, ...], said: str) -> None:
    with pytest.raises(ServerError, match=f"(?s){said}"):
        answering(*pieces).ask([[1, 2]], 3, streamed=True)


def test_a_token_takes_what_it_takes_while_all_decode() -> None:
    """The first row begins early and alone, at ten times the pace; the other goes on when it has ended."""
    early = Answer([0.0, 0.1, 1.0, 2.0, 3.0], [1, 2, 3, 4, 6])
    late = Answer([1.0, 2.0, 3.0, 3.1], [1, 2, 4, 5])
    assert per_token([early, late]) == pytest.approx(1e3 * 2 / 3)
    with pytest.raises(ServerError, match="did not decode together"):
        per_token([early, Answer([4.0, 5.0], [1, 2])])
