"""A weighted sum of other recommenders' scores."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from peft_bituning.errors import ConfigurationError, InputError


class Scorer(Protocol):
    """Anything that scores the catalog for a batch of histories."""

    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """`[B, N]` indices and mask -> `[B, I]`."""


class ScoreSum:
    """`score(j) = sum over parts of weight * part(j)`, such as item-kNN + 4 x text similarity.

    Args:
        parts: Weight and recommender, one pair a part, all over one catalog.

    Raises:
        ConfigurationError: There is no part.
    """

    def __init__(self, parts: Sequence[tuple[float, Scorer]]) -> None:
        if not parts:
            raise ConfigurationError("parts must be at least one pair of weight and recommender, got none")
        self.parts = list(parts)

    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Add up the parts' scores for histories [B, N] -> [B, I] float32.

        Raises:
            InputError: The parts score catalogs of different sizes.
        """
        scored = [part.scores(item_indices, mask) for _, part in self.parts]
        sizes = [scores.shape[1] for scores in scored]
        if len(set(sizes)) > 1:
            raise InputError(f"all parts must score one catalog, got {sizes} items; fit them on the same one")
        weights = [weight for weight, _ in self.parts]
        total = torch.zeros_like(scored[0], dtype=torch.float32)
        for weight, scores in zip(weights, scored, strict=True):
            total += weight * scores
        return total
