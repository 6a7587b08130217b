"""Similarity of frozen text vectors, without any training.

Shapes: `B` rows, `N` history length, `I` catalog items, `D` width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.recommenders import Precomputed
from peft_bituning.recommenders.hybrid import Whitening


class TextSimilarity:
    """Score items by the cosine of their text with the history's, recent items counting more.

    `score(j) = cos(sum over the history of decay^age * t_age, t_j)` over unit vectors, age 0 being the last item.

    Args:
        vectors: `[I, D]`, one row an item.
        decay: Weight of an item relative to the one after it, in (0, 1].
        centre: Take the catalog's mean off every vector first: a language model's vectors share a large one.
        shrinkage: Whiten the vectors instead, as the hybrid does, with this lambda.

    Raises:
        InputError: The vectors are not `[I, D]`, or not finite.
        ConfigurationError: `decay` is out of its range.
    """

    def __init__(self, vectors: Any, decay: float = 0.7, centre: bool = True, shrinkage: float | None = None) -> None:
        if not 0 < decay <= 1:
            raise ConfigurationError(f"decay must be in (0, 1], got {decay!r}")
        table = Precomputed(vectors).embeddings  # checked there
        self.decay = decay
        if shrinkage is not None:
            table = torch.from_numpy(Whitening.fit(table.numpy(), shrinkage)(table.numpy()))
        elif centre:
            table = table - table.mean(0)
        self.vectors = functional.normalize(table, dim=1)  # [I, D]

    @property
    def num_items(self) -> int:
        """Catalog size I."""
        return len(self.vectors)

    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Score every item by its text.

        Args:
            item_indices: `[B, N]` catalog indices, oldest first; those outside the catalog count as masked.
            mask: `[B, N]`, true or 1 at real items.

        Returns:
            `[B, I]` float32 from -1 to 1; 0 for an empty history.

        Raises:
            InputError: Shapes do not fit.
        """
        if item_indices.ndim != 2 or mask.shape != item_indices.shape:
            raise InputError(
                "item_indices and mask must both have shape [rows, history length], "
                f"got {list(item_indices.shape)} and {list(mask.shape)}"
            )
        vectors = self.vectors.to(item_indices.device)
        real = mask.bool() & (item_indices >= 0) & (item_indices < self.num_items)
        ages = real.flip(1).cumsum(1).flip(1) - 1
        weights = torch.where(real, self.decay ** ages.float(), 0.0)  # [B, N]
        texts = vectors[item_indices.masked_fill(~real, 0)]  # [B, N, D]
        users = torch.einsum("bn,bnd->bd", weights, texts)
        return functional.normalize(users, dim=1) @ vectors.T
