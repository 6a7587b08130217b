"""Weights of features by maximum likelihood, and which parts the data support.

Shapes: `U` users, `K` items that a user chooses among, `F` features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

L2 = 1e-3
VALUES_AT_ONCE = 1 << 17  # features that a processor's cache holds
FIRST_USERS = 1000  # a larger fit starts from the weights of so many
CLEAR = 10.0  # a part whose Wald statistic is above its features' number by so much is supported, whatever a refit says


@dataclass(frozen=True)
class Choices:
    """What each of U users chose, among which items.

    Args:
        features: `[U, F, K]` float32.
        offsets: `[U, K]` float32 added to the logits: 0, the logarithm of how many items an item stands for, or -inf
            where there is none.
        chosen: `[U]` the place of the chosen item among K.
        items: `[U, K]` the items' catalog indices; None where all users choose among the whole catalog.
    """

    features: Tensor
    offsets: Tensor
    chosen: Tensor
    items: Tensor | None = None

    def among(self, columns: Sequence[int]) -> "Choices":
        """Return the choices by some features alone."""
        if list(columns) == list(range(self.features.shape[1])):
            return self
        return replace(self, features=self.features[:, list(columns)])

    def of_users(self, users: Tensor) -> "Choices":
        """Return the choices of some users, which may occur more than once."""
        items = None if self.items is None else self.items[users]
        return Choices(self.features[users], self.offsets[users], self.chosen[users], items)

    def loss(self, weights: np.ndarray, l2: float = L2) -> tuple[float, np.ndarray, np.ndarray]:
        """Return `-sum over users of log P(chosen) + l2 / 2 ||w||^2`, its gradient [F] and its Hessian [F, F].

        `P(k) = exp(w . phi_k + o_k) / sum over K`; in float64.
        """
        w = torch.from_numpy(weights)
        value, gradient = l2 / 2 * float(w @ w), l2 * w
        hessian = l2 * torch.eye(len(w), dtype=torch.float64)
        at_once = max(1, VALUES_AT_ONCE // max(1, self.features[:1].numel()))
        for start in range(0, len(self.chosen), at_once):
            rows = slice(start, start + at_once)
            features, chosen = self.features[rows].double(), self.chosen[rows]  # [B, F, K]
            logits = (w @ features + self.offsets[rows]).log_softmax(1)  # [B, K]
            users = torch.arange(len(chosen))
            value -= float(logits[users, chosen].sum())
            weighted = features * logits.exp()[:, None]
            means = weighted.sum(2)  # [B, F]
            gradient = gradient + (means - features[users, :, chosen]).sum(0)
            hessian += (weighted @ features.transpose(1, 2)).sum(0) - means.T @ means
        return value, gradient.numpy(), hessian.numpy()


@dataclass(frozen=True)
class Fit:
    """Weights that were fitted, with what tells how much the data say of them."""

    weights: dict[str, float]
    loss: float
    hessian: np.ndarray


def fit_weights(choices: Choices, names: Sequence[str], start: Mapping[str, float] | None = None) -> Fit:
    """Minimise the loss, which is convex, by Newton's method in a trust region; the same every time."""
    if not names:
        return Fit({}, choices.loss(np.zeros(0))[0], np.zeros((0, 0)))

    @lru_cache(maxsize=4)
    def at(point: bytes) -> tuple[float, np.ndarray, np.ndarray]:
        return choices.loss(np.frombuffer(point).copy())

    if start is None and len(choices.chosen) > FIRST_USERS:
        step = len(choices.chosen) // FIRST_USERS
        start = fit_weights(choices.of_users(torch.arange(0, len(choices.chosen), step)[:FIRST_USERS]), names).weights
    first = np.array([(start or {}).get(name, 0.0) for name in names])
    found = minimize(
        lambda w: at(w.tobytes())[0],
        first,
        jac=lambda w: at(w.tobytes())[1],
        hess=lambda w: at(w.tobytes())[2],
        method="trust-exact",
        options={"gtol": 1e-4 * len(choices.chosen) ** 0.5, "maxiter": 100, "initial_trust_radius": 10.0},
    )
    loss, _, hessian = at(found.x.tobytes())
    return Fit(dict(zip(names, found.x.tolist(), strict=True)), loss, hessian)


def fit_supported(choices: Choices, parts: Mapping[str, Sequence[str]], positive: Sequence[str] = ()) -> Fit:
    """Fit weights, without the parts that the data do not support.

    A part goes where Akaike's criterion, `loss + number of weights`, is lower without it; the least supported first.
    A part in `positive` goes where its weight is not above 0, too.

    Args:
        choices: the users' choices, by all features in the order of `parts`.
        parts: each part's features.
        positive: parts of one feature that may only raise an item.

    Returns:
        The weights of the features that are left.
    """
    names = [name for features in parts.values() for name in features]
    left = dict(parts)
    fit = _refit(choices, names, left)
    while left:
        wrong = [part for part in positive if part in left and fit.weights[left[part][0]] <= 0]
        doubtful = wrong[:1] or [part for part in left if _wald(fit, left[part]) < len(left[part]) + CLEAR]
        without = [(part, _refit(choices, names, left, part, fit)) for part in doubtful]
        gains = {part: fit.loss + len(left[part]) - other.loss for part, other in without}
        if not gains or (max(gains.values()) <= 0 and not wrong):
            return fit
        worst = max(gains, key=lambda part: gains[part])
        fit = dict(without)[worst]
        del left[worst]
    return fit


def _refit(
    choices: Choices,
    names: Sequence[str],
    parts: Mapping[str, Sequence[str]],
    without: str | None = None,
    before: Fit | None = None,
) -> Fit:
    kept = [name for part, features in parts.items() if part != without for name in features]
    return fit_weights(
        choices.among([names.index(name) for name in kept]), kept, None if before is None else before.weights
    )


def _wald(fit: Fit, features: Sequence[str]) -> float:
    """Return half the square of a part's weights over their covariance: about what the loss would rise without it."""
    places = [list(fit.weights).index(name) for name in features]
    weights = np.array([fit.weights[name] for name in features])
    covariance = np.linalg.pinv(fit.hessian)[np.ix_(places, places)]
    return float(weights @ np.linalg.pinv(covariance) @ weights) / 2
