"""Paired bootstrap: whether one method beats another on the same users.

Shapes: `U` users, `R` resamples.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError, InputError

_CELLS = 4_000_000  # draws held at once


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference between two methods over the same users."""

    difference: float  # its mean
    low: float  # lower end of the 95 % interval
    high: float  # upper end of the 95 % interval
    p: float  # two-sided, from resamples on the other side of zero; never below `2 / (R + 1)`
    resamples: int  # R

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON can hold them."""
        return asdict(self)


def paired_bootstrap(
    values: np.ndarray, baseline: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Resample the users of both methods together, with replacement.

    `d_u = values_u - baseline_u`; every resample draws U users and takes the mean of their `d_u`; the interval runs
    from the 2.5th to the 97.5th percentile of the means, and `p = 2 (1 + min(#{means <= 0}, #{means >= 0})) / (R + 1)`,
    at most 1. It covers which users were met, not which seeds were drawn.

    Args:
        values: `[U]` a metric of each user.
        baseline: `[U]` the same metric of the same users by the other method.
        resamples: R.
        seed: Of the draws.

    Returns:
        The difference, its interval and p.

    Raises:
        InputError: The two do not have the same shape `[U]`, U at least 1, or hold NaN.
        ConfigurationError: `resamples` is below 1.
    """
    if values.ndim != 1 or values.shape != baseline.shape or not values.size:
        raise InputError(
            f"values and baseline must both have shape [users], got {list(values.shape)} and {list(baseline.shape)}"
        )
    if resamples < 1:
        raise ConfigurationError(f"resamples must be at least 1, got {resamples!r}")
    differences = values.astype(np.float64) - baseline.astype(np.float64)  # [U]
    if np.isnan(differences).any():
        raise InputError("values and baseline must not be NaN; rank the users again")
    users = len(differences)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CELLS // users)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = differences[generator.integers(users, size=(count, users))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (1 + beyond) / (resamples + 1))
    return PairedDifference(float(differences.mean()), float(low), float(high), p, resamples)
