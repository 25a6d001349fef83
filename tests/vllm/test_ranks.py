"""Tensor parallelism: with global picks the ranks answer as one device does; each by its own heads they do not."""

from __future__ import annotations

import pytest
from harness import SPARSE, Driver, Row, ask, prompt

CLOSE = 2e-4
PROMPTS = [prompt(300, 1), prompt(171, 2), prompt(40, 3)]


@pytest.fixture(scope="module")
def one_device(engines: Driver, tiny: str) -> list[Row]:
    return engines.run(tiny, ask(*PROMPTS), settings=SPARSE)[0]


def test_global_picks_are_those_of_one_device(engines: Driver, tiny: str, one_device: list[Row]) -> None:
    rows = engines.run(tiny, ask(*PROMPTS), settings=SPARSE, tensor_parallel_size=2)[0]
    for row, alone in zip(rows, one_device, strict=True):
        assert row.tokens == alone.tokens
        assert float((row.logprobs - alone.logprobs).abs().max()) < CLOSE


def test_local_picks_are_others(engines: Driver, tiny: str, one_device: list[Row]) -> None:
    """So the test above can tell whether ranks agree on their picks. Prefill and dense rows do not change."""
    rows = engines.run(tiny, ask(*PROMPTS), settings={**SPARSE, "tp_selection": "local"}, tensor_parallel_size=2)[0]
    apart = [
        float((row.logprobs[1] - alone.logprobs[1]).abs().max()) for row, alone in zip(rows, one_device, strict=True)
    ]
    assert apart[0] > 100 * CLOSE and apart[1] > 100 * CLOSE and apart[2] < CLOSE
