"""Seconds and peak memory of phases."""

import time

import pytest
import torch
from bench.methods.meter import Meter, time_users


def test_every_phase_has_its_own_peak() -> None:
    meter = Meter(torch.device("cpu"))
    with meter.phase("large"):
        held = torch.ones(100 * 2**18)  # 100 MiB
        assert held.sum() > 0
        del held
    with meter.phase("small"):
        time.sleep(0.05)
    large, small = meter.phases["large"], meter.phases["small"]
    assert 0.05 <= small["seconds"] < 5
    if not small["own_peak"]:
        pytest.skip("this system keeps one peak a process")
    assert 80 < large["peak_memory_mb"] - small["peak_memory_mb"] < 200


def test_the_median_user() -> None:
    meter = Meter(torch.device("cpu"))
    seen: list[float] = []

    def rank(seconds: float) -> None:
        seen.append(seconds)
        time.sleep(seconds)

    time_users(meter, rank, [0.2, 0.01, 0.02])
    assert seen == [0.2, 0.2, 0.01, 0.02]
    assert 0.02 <= meter.phases["user"]["seconds"] < 0.2
    assert meter.phases["user"]["users"] == 3
