"""Evaluation mode on a GPU, under every method: what `compare`, `calibrate` and the Pareto measure by."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deltakv.evals.windows import measure_windows, open_window
from deltakv.methods import REGISTRY, parse

pytestmark = pytest.mark.gpu

SMALL = {
    "full": "full",
    "streaming": "streaming:window=48",
    "lessismore": "lessismore:budget=80",
    "h2o": "h2o:budget=64,recent=32,lag=5",
    "a2sf": "a2sf:budget=64,lag=3",
    "tokenselect": "tokenselect:budget=64,recent=16",
    "lazyeviction": "lazyeviction:budget=64,recent=16,lag=7,alpha=0.15",
    "delta": "delta:budget=64,recent=16,min_context=0",
}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_it_measures_what_a_cpu_does(tiny_model: Any, name: str) -> None:
    model = tiny_model("llama")
    piece = torch.randint(3, 128, (241,), generator=torch.Generator().manual_seed(3))
    method = parse(SMALL.get(name, f"{name}:budget=64"))
    found = []
    with torch.no_grad():
        for one in (model, copy.deepcopy(model).cuda()):
            window = open_window(one, piece, 80, method.page_size)
            found.append(measure_windows(one, method, [window], picks=True))
    cpu, gpu = found
    assert cpu.attended == pytest.approx(gpu.attended, rel=0.02)  # a tie may fall the other way
    assert (cpu.recall is None) == (gpu.recall is None)
    near = (cpu.differences.kl - gpu.differences.kl).abs() <= 1e-4 + 1e-3 * cpu.differences.kl
    assert near.double().mean() > 0.9
    assert gpu.differences.surprise.mean().item() == pytest.approx(cpu.differences.surprise.mean().item(), rel=1e-3)
