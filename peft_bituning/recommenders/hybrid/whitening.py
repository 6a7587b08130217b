"""Whitening with shrinkage: text vectors in which no direction counts for more than the others."""

from dataclasses import dataclass

import numpy as np

from ...errors import ConfigurationError, InputError


@dataclass(frozen=True)
class Whitening:
    """`t = (x - mean) map`, then length 1: the directions of the catalog's vectors, each by its strength.

    With `X - mean = U S V^T`: `map = V diag(1 / sqrt(s^2 + lambda mean(s^2)))`. A lambda of 0 makes all directions
    alike, a great one only centres.
    """

    mean: np.ndarray  # [d]
    map: np.ndarray  # [d, r]

    @classmethod
    def fit(cls, vectors: np.ndarray, shrinkage: float) -> "Whitening":
        """Learn it from vectors `[I, d]`.

        Raises:
            ConfigurationError: lambda is below 0 or not finite.
            InputError: the vectors are not `[I, d]`, or not finite.
        """
        if not 0 <= shrinkage < np.inf:
            raise ConfigurationError(f"shrinkage must be a finite number >= 0, got {shrinkage!r}")
        if vectors.ndim != 2 or 0 in vectors.shape or not np.isfinite(vectors).all():
            raise InputError(f"text vectors must be finite, of shape [items, width], got {list(vectors.shape)}")
        vectors = vectors.astype(np.float64)
        mean = vectors.mean(0)
        strength, directions = np.linalg.eigh((vectors - mean).T @ (vectors - mean))  # s^2 ascending, V
        strength = np.maximum(strength, 0.0)
        kept = strength > max(strength[-1], np.finfo(np.float64).tiny) * 1e-10
        scale = 1 / np.sqrt(strength[kept] + shrinkage * strength[kept].mean()) if kept.any() else np.ones(0)
        return cls(mean.astype(np.float32), (directions[:, kept] * scale).astype(np.float32))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Whiten vectors `[J, d]` to `[J, r]` float32 of length 1; a row of zeros, an item without text, stays."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise InputError(f"text vectors must be [items, {len(self.mean)}], got {list(vectors.shape)}")
        white = (vectors.astype(np.float32) - self.mean) @ self.map
        white[~vectors.any(1)] = 0.0
        return white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-12)
