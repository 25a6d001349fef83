"""Profiles: what lies between two measurements, files, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltakv
from deltakv.offload.profile import TIMINGS, VERSION, Profile, Timing, profile_path, seconds_of
from deltakv.offload.scheduler import LayerShape
from offload.made_up import SHAPE, profile


def test_between_measurements() -> None:
    constant_rate = (Timing(100, 1.0), Timing(10_000, 100.0))
    assert seconds_of(constant_rate, 1_000) == pytest.approx(10.0)
    constant_time = (Timing(100, 3.0), Timing(10_000, 3.0))
    assert seconds_of(constant_time, 700) == pytest.approx(3.0)
    assert seconds_of(constant_rate, 1) == 1.0, "what is smaller than the smallest takes as long"
    assert seconds_of(constant_rate, 20_000) == pytest.approx(200.0), "beyond the largest its rate holds"


def test_rates_are_those_of_the_chunk_s_size() -> None:
    made = profile(to_device=(Timing(1_000, 1e-5), Timing(1_000_000, 1e-4)), to_device_pageable=(Timing(1000, 1.0),))
    assert made.rates(SHAPE, 1, 100, 1_000_000).bus == pytest.approx(1e10)
    assert made.rates(SHAPE, 1, 100, 1_000).bus == pytest.approx(1e8)
    assert made.rates(SHAPE, 1, 100, 1_000, pinned=False).bus == pytest.approx(1e3)


def test_rates_of_the_gpu() -> None:
    made = profile(recompute=(Timing(64, 2.0),), attention=(Timing(64, 0.5),), rest=(Timing(1, 1.0), Timing(4, 1.0)))
    rates = made.rates(SHAPE, 4, 160, 64 * SHAPE.alpha)
    assert rates.gemm == pytest.approx(64 * SHAPE.phi / 2.0)
    assert rates.other == pytest.approx(1.0 + 4 * 160 * 0.5 / 64)


def test_another_layer_shape_is_refused() -> None:
    other = LayerShape(hidden=128, kv_heads=4, head_dim=16, element_bytes=4)
    with pytest.raises(deltakv.InputError, match=r"the profile is of layers .*\(64, 4, 16\).*\(128, 4, 16\)"):
        profile().rates(other, 1, 100, 1_000)


def test_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "profile.json"
    profile().save(path)
    assert Profile.load(path) == profile()
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def broken(change: Any) -> str:
    data = json.loads(json.dumps({"version": VERSION, **profile().__dict__}, default=lambda timing: timing.__dict__))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a profile of this version"),
        (broken(lambda data: data.update(version=0)), "not a profile of this version"),
        (broken(lambda data: data.pop("rest")), "lacks a measurement"),
        (broken(lambda data: data.update(rest=[])), "needs measurements of 'rest'"),
        (broken(lambda data: data.update(rest=[{"size": 1, "seconds": 0}])), "'rest' has times that are not above 0"),
        (broken(lambda data: data.update(shape=[1])), "lacks a measurement"),
        (broken(lambda data: data.update(shape=[float("inf"), 1, 1])), "lacks a measurement"),
        (broken(lambda data: data["rest"][0].update(size=float("inf"))), "lacks a measurement"),
        (broken(lambda data: data.update(rest=[{"size": 10**400, "seconds": 1}])), "needs measurements of 'rest'"),
    ],
    ids=range(10),
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(deltakv.InputError, match=message):
        Profile.load(path)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    assert Profile.load(path, torch.float32) == profile()
    with pytest.raises(deltakv.InputError, match="was measured in float32, but this model computes in bfloat16"):
        Profile.load(path, torch.bfloat16)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(deltakv.InputError, match="cannot be read: No such file"):
        Profile.load(tmp_path / "none.json")


def test_machines_and_models_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DELTAKV_CACHE", str(tmp_path))
    paths = {profile_path(machine, model) for machine in ("NVIDIA H200", "CPU") for model in ("a", "b")}
    assert len(paths) == 4
    assert all(path.parent == tmp_path / "offload" for path in paths)


def test_every_measurement_is_named() -> None:
    assert len(TIMINGS) == 7
