"""The likelihood and its slopes against numpy, its maximum against Newton's method by hand, and which parts stay."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.recommenders.hybrid import weights as module
from peft_bituning.recommenders.hybrid.weights import Choices, fit_supported, fit_weights

L2 = 1e-3


def planted(weights: Sequence[float], users: int = 400, items: int = 10, seed: int = 0, gaps: bool = False) -> Choices:
    """Draw features, offsets and choices by these weights; with gaps some places hold no item."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(users, len(weights), items)).astype(np.float32)
    offsets = generator.normal(size=(users, items)).astype(np.float32)
    if gaps:
        offsets[:, 2:][generator.random((users, items - 2)) < 0.3] = -np.inf
    logits = np.einsum("f,ufk->uk", np.array(weights), features.astype(np.float64)) + offsets
    chosen = (logits + generator.gumbel(size=logits.shape)).argmax(1)
    return Choices(torch.from_numpy(features), torch.from_numpy(offsets), torch.from_numpy(chosen))


def loss_by_hand(choices: Choices, weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return -log likelihood + l2 / 2 ||w||^2, its gradient and its Hessian, user by user and item by item."""
    value = L2 / 2 * float(weights @ weights)
    gradient, hessian = L2 * weights, L2 * np.eye(len(weights))
    for features, offsets, chosen in zip(
        choices.features.double().numpy(), choices.offsets.double().numpy(), choices.chosen.tolist(), strict=True
    ):
        real = np.isfinite(offsets)
        strengths = np.where(real, np.exp(np.where(real, weights @ features + np.where(real, offsets, 0), 0)), 0)
        shares = strengths / strengths.sum()
        value -= np.log(shares[chosen])
        mean = features @ shares
        gradient = gradient + mean - features[:, chosen]
        for item, share in enumerate(shares):
            hessian = hessian + share * np.outer(features[:, item] - mean, features[:, item] - mean)
    return float(value), gradient, hessian


def newton(choices: Choices, columns: Sequence[int]) -> tuple[np.ndarray, float]:
    """Return the weights of some features at the least loss, and that; steps are halved until the loss falls."""
    features = choices.features.double().numpy()[:, list(columns)]
    offsets, chosen = choices.offsets.double().numpy(), choices.chosen.numpy()
    users = np.arange(len(chosen))
    weights = np.zeros(len(columns))

    def at(point: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.einsum("f,ufk->uk", point, features) + offsets
        highest = logits.max(1, keepdims=True)
        strengths = np.exp(logits - highest)
        shares = strengths / strengths.sum(1, keepdims=True)
        logs = logits[users, chosen] - highest[:, 0] - np.log(strengths.sum(1))
        return float(L2 / 2 * point @ point - logs.sum()), shares

    for _ in range(100):
        value, shares = at(weights)
        means = np.einsum("ufk,uk->uf", features, shares)
        gradient = L2 * weights + (means - features[users, :, chosen]).sum(0)
        hessian = L2 * np.eye(len(weights)) + np.einsum("ufk,uk,ugk->fg", features, shares, features) - means.T @ means
        step = np.linalg.solve(hessian, gradient) if len(weights) else gradient
        if not len(weights) or np.abs(gradient).max() < 1e-9:
            break
        while at(weights - step)[0] > value and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights - step
    return weights, at(weights)[0]


def supported_by_hand(
    choices: Choices, parts: Mapping[str, Sequence[str]], positive: Sequence[str] = ()
) -> dict[str, float]:
    """Take parts out while `loss + number of weights` falls by it, the best first; wrong signs before all else."""
    names = [name for features in parts.values() for name in features]
    left = dict(parts)

    def fit(kept: Mapping[str, Sequence[str]]) -> tuple[dict[str, float], float]:
        columns = [names.index(name) for features in kept.values() for name in features]
        weights, loss = newton(choices, columns)
        return {names[column]: weight for column, weight in zip(columns, weights, strict=True)}, loss + len(columns)

    while left:
        found, criterion = fit(left)
        wrong = [part for part in positive if part in left and found[left[part][0]] <= 0]
        options = {part: fit({other: left[other] for other in left if other != part})[1] for part in wrong[:1] or left}
        best = min(options, key=lambda part: options[part])
        if not wrong and options[best] >= criterion:
            return found
        del left[best]
    return {}


# ---------------------------------------------------------------------- the loss


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.lists(st.floats(-3, 3), max_size=3)
)
def test_loss_gradient_and_hessian(seed: int, users: int, items: int, gaps: bool, point: list[float]) -> None:
    choices = planted([0.5] * len(point), users, items + 2, seed, gaps)
    found, expected = choices.loss(np.array(point)), loss_by_hand(choices, np.array(point))
    assert found[0] == pytest.approx(expected[0], rel=1e-10, abs=1e-10)
    assert np.allclose(found[1], expected[1], rtol=1e-9, atol=1e-9)
    assert found[2].shape == (len(point), len(point)) and np.allclose(found[2], expected[2], rtol=1e-9, atol=1e-9)


def test_gradient_and_hessian_are_those_of_finite_differences() -> None:
    choices, point, step = planted([0.5, -1.0, 0.2], 40, gaps=True), np.array([0.3, 0.2, -0.7]), 1e-5
    _, gradient, hessian = choices.loss(point)
    for place in range(3):
        ahead, behind = (choices.loss(point + sign * step * np.eye(3)[place]) for sign in (1, -1))
        assert gradient[place] == pytest.approx((ahead[0] - behind[0]) / (2 * step), rel=1e-5)
        assert np.allclose(hessian[place], (ahead[1] - behind[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_a_stronger_penalty() -> None:
    choices, point = planted([0.5, -1.0], 20), np.array([0.3, 0.2])
    weak, strong = choices.loss(point, 0.0), choices.loss(point, 2.0)
    assert strong[0] - weak[0] == pytest.approx(float(point @ point))
    assert np.allclose(strong[1] - weak[1], 2 * point) and np.allclose(strong[2] - weak[2], 2 * np.eye(2))


def test_many_users_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    choices, point = planted([0.5, -1.0], 37), np.array([0.3, 0.2])
    at_once = choices.loss(point)
    monkeypatch.setattr(module, "VALUES_AT_ONCE", 100)
    in_pieces = choices.loss(point)
    for place in range(3):
        assert np.allclose(at_once[place], in_pieces[place], rtol=1e-12)


def test_huge_logits_do_not_overflow() -> None:
    choices = planted([1.0], 5)
    value, gradient, hessian = choices.loss(np.array([1e4]))
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.isfinite(hessian).all()


def test_some_features_and_some_users() -> None:
    choices = planted([0.5, -1.0, 0.2], 6)
    assert choices.among([0, 1, 2]) is choices
    assert torch.equal(choices.among([2, 0]).features, choices.features[:, [2, 0]])
    users = torch.tensor([4, 4, 1])
    some = choices.of_users(users)
    assert torch.equal(some.features, choices.features[[4, 4, 1]]) and some.items is None
    assert torch.equal(some.offsets, choices.offsets[[4, 4, 1]]) and torch.equal(some.chosen, choices.chosen[[4, 4, 1]])
    items = torch.arange(60).reshape(6, 10)
    of_items = Choices(choices.features, choices.offsets, choices.chosen, items)
    chosen_items = of_items.of_users(users).items
    assert chosen_items is not None and torch.equal(chosen_items, items[[4, 4, 1]])
    kept = of_items.among([1]).items
    assert kept is not None and torch.equal(kept, items)


# ---------------------------------------------------------------------- the fit


@pytest.mark.parametrize("gaps", [False, True])
def test_the_fit_is_where_the_gradient_is_near_zero(gaps: bool) -> None:
    choices = planted([0.8, -1.5, 0.0], gaps=gaps)
    fit = fit_weights(choices, ["a", "b", "c"])
    point = np.array([fit.weights[name] for name in "abc"])
    value, gradient, hessian = loss_by_hand(choices, point)
    assert np.abs(gradient).max() < 1e-4 * len(choices.chosen) ** 0.5 * 1.01
    assert fit.loss == pytest.approx(value, rel=1e-10) and np.allclose(fit.hessian, hessian, rtol=1e-8, atol=1e-8)
    best, least = newton(choices, [0, 1, 2])
    assert np.allclose(point, best, atol=1e-3) and fit.loss == pytest.approx(least, abs=1e-5)


def test_the_same_bits_twice() -> None:
    first, second = (fit_weights(planted([0.8, -1.5, 0.0], seed=5), ["a", "b", "c"]) for _ in range(2))
    assert first.weights == second.weights and first.loss == second.loss
    assert first.hessian.tobytes() == second.hessian.tobytes()


@pytest.mark.parametrize("weights", [[1.0, -0.5, 0.25], [3.0, 0.0], [-0.7]])
def test_planted_weights_are_found(weights: list[float]) -> None:
    choices = planted(weights, users=4000, seed=1)
    fit = fit_weights(choices, [str(place) for place in range(len(weights))])
    deviations = 1 / np.sqrt(np.diag(fit.hessian))
    assert (np.abs(np.array(list(fit.weights.values())) - weights) < 4.5 * deviations + 0.01).all()
    assert deviations.max() < 0.1


def test_many_users_start_from_some() -> None:
    choices = planted([0.6, -0.2], users=module.FIRST_USERS * 2 + 7, items=5)
    found = fit_weights(choices, ["a", "b"]).weights
    assert np.allclose(list(found.values()), newton(choices, [0, 1])[0], atol=1e-3)


@pytest.mark.parametrize("start", [{"a": 5.0, "b": -5.0}, {"a": 0.7}, {"other": 3.0}])
def test_another_start_comes_to_the_same_end(start: dict[str, float]) -> None:
    choices = planted([0.6, -0.2])
    found, expected = (fit_weights(choices, ["a", "b"], begin).weights for begin in (start, None))
    assert found == pytest.approx(expected, abs=1e-3)


def test_no_features_at_all() -> None:
    choices = planted([], users=7, items=4)
    fit = fit_weights(choices, [])
    assert fit.weights == {} and fit.hessian.shape == (0, 0)
    assert fit.loss == pytest.approx(loss_by_hand(choices, np.zeros(0))[0])
    nothing = fit_supported(choices, {})
    assert nothing.weights == {} and nothing.loss == pytest.approx(fit.loss)


def test_no_users_at_all() -> None:
    choices = planted([0.5, 0.5], users=0)
    assert fit_weights(choices, ["a", "b"]).weights == pytest.approx({"a": 0.0, "b": 0.0})
    assert fit_supported(choices, {"a": ["a"], "b": ["b"]}).weights == {}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_separating_feature_stays_finite_and_is_kept(sign: int) -> None:
    """Always chosen, or never: the likelihood rises for ever, and the penalty alone ends it."""
    generator = np.random.default_rng(0)
    chosen = torch.from_numpy(generator.integers(0, 5, 300))
    features = torch.from_numpy(generator.normal(size=(300, 2, 6))).float()
    features[:, 0] = 0.0
    features[torch.arange(300), 0, chosen if sign == 1 else (chosen + 1) % 5] = sign
    features[:, 0, 5] = 0.0
    choices = Choices(features, torch.zeros(300, 6), chosen)
    fit = fit_supported(choices, {"separating": ["separating"], "noise": ["noise"]})
    weight = fit.weights["separating"]
    assert 3 < weight < 100
    assert abs(choices.among([0]).loss(np.array([weight]))[1][0]) < 1e-2
    found = fit_weights(choices, ["separating", "noise"]).weights
    assert all(np.isfinite(value) for value in found.values())


# ---------------------------------------------------------------------- which parts stay


def test_noise_goes_and_what_is_real_stays() -> None:
    choices = planted([0.8, 0.0, -0.5], users=1500)
    parts = {"real": ["a"], "noise": ["b"], "other": ["c"]}
    assert newton(choices, [0, 2])[1] - newton(choices, [0, 1, 2])[1] < 1  # so Akaike says of this draw, too
    fit = fit_supported(choices, parts)
    assert list(fit.weights) == ["a", "c"]
    assert np.allclose(list(fit.weights.values()), newton(choices, [0, 2])[0], atol=1e-3)
    assert fit_supported(choices.among([1]), {"noise": ["b"]}).weights == {}


def test_a_part_goes_as_a_whole() -> None:
    choices = planted([0.8, 0.0, 0.0, 0.0], users=1500, seed=3)
    fit = fit_supported(choices, {"half": ["a", "b"], "noise": ["c", "d"]})
    assert list(fit.weights) == ["a", "b"]  # b has no effect, but its part has


def test_what_may_only_raise_goes_where_it_would_lower() -> None:
    choices = planted([0.8, -0.9], users=800)
    parts = {"real": ["a"], "laser": ["b"]}
    assert newton(choices, [0, 1])[0][1] < -0.5
    assert set(fit_supported(choices, parts).weights) == {"a", "b"}
    fit = fit_supported(choices, parts, ["laser"])
    assert set(fit.weights) == {"a"}
    assert fit.weights["a"] == pytest.approx(newton(choices, [0])[0][0], abs=1e-3)
    raising = Choices(choices.features * torch.tensor([1.0, -1.0])[:, None], choices.offsets, choices.chosen)
    assert fit_supported(raising, parts, ["laser"]).weights["b"] > 0.5


def test_of_two_alike_one_is_enough() -> None:
    choices = planted([0.8], users=500)
    twice = Choices(choices.features.repeat(1, 2, 1), choices.offsets, choices.chosen)
    fit = fit_supported(twice, {"one": ["a"], "two": ["b"]})
    assert len(fit.weights) == 1
    assert next(iter(fit.weights.values())) == pytest.approx(newton(choices, [0])[0][0], abs=1e-3)


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from([0.0, 0.05, -0.1, 0.15, -0.6]), min_size=4, max_size=4),
    st.booleans(),
)
def test_the_parts_are_those_of_the_criterion(seed: int, weights: list[float], positive: bool) -> None:
    choices = planted(weights, users=150, items=6, seed=seed)
    parts = {"first": ["a"], "pair": ["b", "c"], "laser": ["d"]}
    only = ["laser"] if positive else []
    found, expected = fit_supported(choices, parts, only).weights, supported_by_hand(choices, parts, only)
    assert list(found) == list(expected)
    assert np.allclose(list(found.values()), list(expected.values()), atol=2e-3)
