"""The paired bootstrap against numpy on its own."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.metrics import bootstrap as module
from peft_bituning.metrics.bootstrap import paired_bootstrap


def make_pair(shift: float, users: int = 300) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    baseline = generator.random(users)
    return baseline + shift + generator.normal(0, 0.5, users), baseline


@pytest.mark.parametrize("shift", [-0.2, 0.0, 0.03, 0.2])
def test_against_scipy_and_the_normal_distribution(shift: float) -> None:
    values, baseline = make_pair(shift)
    found = paired_bootstrap(values, baseline, resamples=4000, seed=3)
    differences = values - baseline
    assert found.difference == pytest.approx(differences.mean())
    theirs = bootstrap((differences,), np.mean, n_resamples=4000, method="percentile", rng=5).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.004)
    error = differences.std() / np.sqrt(len(differences))
    assert (found.low, found.high) == pytest.approx(
        (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error), abs=0.004
    )


def test_against_a_loop() -> None:
    values, baseline = make_pair(0.02, users=40)
    found = paired_bootstrap(values, baseline, resamples=500, seed=7)
    generator = np.random.default_rng(7)
    draws = generator.integers(40, size=(500, 40))
    means = np.array([sum(values[user] - baseline[user] for user in draw) / 40 for draw in draws])
    assert (found.low, found.high) == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)))
    assert found.p == pytest.approx(2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / 501)


def test_pieces_draw_what_one_piece_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values, baseline = make_pair(0.02, users=50)
    whole = paired_bootstrap(values, baseline, resamples=300, seed=2)
    monkeypatch.setattr(module, "_CELLS", 50 * 7)
    assert paired_bootstrap(values, baseline, resamples=300, seed=2) == whole


def test_p_says_chance_where_there_is_nothing_else() -> None:
    values, baseline = make_pair(0.0)
    assert paired_bootstrap(values, values, resamples=100).p == 1
    rejected = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0, 1, 200)
        rejected += paired_bootstrap(noise, np.zeros(200), resamples=300, seed=seed).p < 0.05
    assert rejected <= 9
    assert paired_bootstrap(baseline + 1, baseline, resamples=999).p == pytest.approx(0.002)


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"must both have shape \[users\], got \[3\] and \[2\]"):
        paired_bootstrap(np.zeros(3), np.zeros(2))
    with pytest.raises(InputError, match="must not be NaN"):
        paired_bootstrap(np.array([np.nan]), np.zeros(1))
    with pytest.raises(ConfigurationError, match="resamples must be at least 1, got 0"):
        paired_bootstrap(np.zeros(3), np.zeros(3), resamples=0)
