"""Whitening against what it is for: all directions alike at lambda 0, only centred at a great one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.recommenders.hybrid import Whitening


def made(seed: int = 0, rows: int = 40, width: int = 5, rank: int | None = None) -> np.ndarray:
    """Return vectors of unlike directions around a mean; of a rank below their width where one is given."""
    generator = np.random.default_rng(seed)
    rank = width if rank is None else rank
    strengths = np.geomspace(8.0, 0.2, rank)
    return generator.normal(size=(rows, rank)) * strengths @ generator.normal(size=(rank, width)) + 3.0


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("rank", [5, 3])
def test_without_shrinkage_all_kept_directions_are_alike(rank: int) -> None:
    vectors = made(rank=rank)
    whitening = Whitening.fit(vectors, 0.0)
    assert whitening.map.shape == (5, rank) and whitening.mean.shape == (5,)
    white = (vectors - vectors.mean(0)) @ whitening.map
    covariance = white.T @ white / len(white)
    assert np.allclose(covariance, covariance[0, 0] * np.eye(rank), atol=1e-4 * covariance[0, 0])
    assert covariance[0, 0] > 0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 1.0, 3.0, 50.0]), st.integers(1, 6))
def test_the_map_is_its_formula(seed: int, shrinkage: float, width: int) -> None:
    """Up to the sign of the directions: by singular values, products of white vectors are the same."""
    vectors = made(seed, width=width)
    centred = vectors - vectors.mean(0)
    _, strength, directions = np.linalg.svd(centred, full_matrices=False)
    kept = strength**2 > strength[0] ** 2 * 1e-9
    expected = unit(
        centred @ directions[kept].T / np.sqrt(strength[kept] ** 2 + shrinkage * (strength[kept] ** 2).mean())
    )
    white = Whitening.fit(vectors, shrinkage)(vectors)
    assert white.dtype == np.float32
    assert np.allclose(white @ white.T, expected @ expected.T, atol=1e-2 if shrinkage == 0 else 1e-4)


def test_a_great_shrinkage_only_centres() -> None:
    vectors = made()
    white, centred = Whitening.fit(vectors, 1e9)(vectors), unit(vectors - vectors.mean(0))
    assert np.allclose(white @ white.T, centred @ centred.T, atol=1e-4)


def test_a_shrinkage_between_leaves_strong_directions_stronger() -> None:
    vectors = made()
    spreads = []
    for shrinkage in (0.0, 1.0, 1e9):
        whitening = Whitening.fit(vectors, shrinkage)
        variances = ((vectors - vectors.mean(0)) @ whitening.map).var(0)
        spreads.append(variances.max() / variances.min())
    assert spreads[0] == pytest.approx(1, abs=1e-2) and spreads[0] < spreads[1] < spreads[2]


def test_rows_of_zeros_stay_and_all_others_have_length_1() -> None:
    vectors = made()
    vectors[[3, 8]] = 0.0
    white = Whitening.fit(vectors, 3.0)(vectors)
    assert not white[[3, 8]].any()
    assert np.allclose(np.linalg.norm(np.delete(white, [3, 8], axis=0), axis=1), 1, atol=1e-5)


def test_other_vectors_are_mapped_as_those_it_was_fitted_on() -> None:
    vectors = made().astype(np.float32)
    whitening = Whitening.fit(vectors, 3.0)
    assert np.allclose(whitening(vectors[7:9]), whitening(vectors)[7:9], atol=1e-6)
    assert whitening(vectors[:0]).shape == (0, 5)


@pytest.mark.parametrize("vectors", [np.full((6, 3), 0.1), np.ones((1, 3)), np.zeros((4, 3)), np.full((5, 1), 7.0)])
def test_vectors_that_are_all_alike_tell_nothing(vectors: np.ndarray) -> None:
    white = Whitening.fit(vectors, 3.0)(vectors)
    assert len(white) == len(vectors) and np.isfinite(white).all() and not white.any()


@pytest.mark.parametrize("shrinkage", [-0.1, float("nan"), float("inf")])
def test_a_shrinkage_below_0_or_not_finite_is_refused(shrinkage: float) -> None:
    with pytest.raises(ConfigurationError, match="shrinkage must be a finite number >= 0"):
        Whitening.fit(made(), shrinkage)


@pytest.mark.parametrize(
    "vectors", [np.ones(3), np.ones((2, 2, 2)), np.ones((0, 3)), np.ones((3, 0)), np.array([[1.0, np.nan], [0, 1]])]
)
def test_what_are_no_vectors_is_refused(vectors: np.ndarray) -> None:
    with pytest.raises(InputError, match="text vectors must be finite, of shape"):
        Whitening.fit(vectors, 3.0)


def test_other_widths_are_refused() -> None:
    whitening = Whitening.fit(made(), 3.0)
    for wrong in (np.ones((2, 4)), np.ones(5)):
        with pytest.raises(InputError, match=r"text vectors must be \[items, 5\]"):
            whitening(wrong)
