"""Work on a stream of its own: in order with the step's stream on both sides; its memory is not used by others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltakv.integrations.vllm.aside import aside

pytestmark = pytest.mark.gpu
#: Cycles of a GPU's clock: some milliseconds, far more than anything else here takes.
LONG = 20_000_000
SIZE = 1 << 20


def slowly_doubled(x: Tensor) -> Tensor:
    torch.cuda._sleep(LONG)
    return x * 2


def very_slowly_doubled(x: Tensor) -> Tensor:
    """A second, in which a host that shares its cores with others gets a few kernels launched."""
    torch.cuda._sleep(100 * LONG)
    return x * 2


def test_work_begins_after_what_was_asked_before_and_ends_before_its_result_is_read() -> None:
    given = torch.zeros(SIZE, device="cuda")
    slowly_doubled(given)  # compiled, and its memory made, before order counts
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    given.fill_(3.0)
    later = aside(slowly_doubled, given, given)
    got = later.result() + 1.0
    torch.testing.assert_close(got, torch.full_like(got, 7.0))


def test_it_does_not_hold_up_the_stream_until_its_result_is_taken() -> None:
    given, at_once = torch.ones(SIZE, device="cuda"), torch.cuda.Event()
    (given + 1.0).sum()  # loaded, however long that takes a busy host
    torch.cuda.synchronize()
    later = aside(very_slowly_doubled, given, given)
    (given + 1.0).sum()
    at_once.record()
    at_once.synchronize()
    assert not later._done.query()
    later.result()
    torch.cuda.current_stream().synchronize()
    assert later._done is None


def test_what_it_reads_is_kept_until_then() -> None:
    for turn in range(5):
        given = torch.full((SIZE,), float(turn), device="cuda")
        later = aside(slowly_doubled, given, given)
        del given
        torch.full((SIZE,), float("nan"), device="cuda")  # would take the memory of what was given back
        got = later.result().clone()
        torch.testing.assert_close(got, torch.full_like(got, 2.0 * turn))


def test_a_captured_graph_holds_it() -> None:
    given, out, beside = (torch.zeros(SIZE, device="cuda") for _ in range(3))

    def step() -> None:
        made = given + 1.0  # in the graph's memory, which is given to others as soon as nobody holds it
        later = aside(slowly_doubled, made, made)
        del made
        beside.copy_(torch.full_like(given, float("nan")).nan_to_num(0.0) + given + 6.0)
        out.copy_(later.result())

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for value in range(20):
        given.fill_(float(value))
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, torch.full_like(out, 2.0 * (value + 1)))
        torch.testing.assert_close(beside, torch.full_like(out, value + 6.0))
