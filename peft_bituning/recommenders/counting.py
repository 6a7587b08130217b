"""Recommenders that only count: popularity and item-kNN, the floor every trained model is held against.

Shapes: `B` rows, `N` history length, `I` catalog items.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from ..errors import ConfigurationError, DataError
from .histories import Cells, Histories
from .neighbors import NeighborLists


class Popularity:
    """Score every item by how often it occurs in the training sequences, whatever the history.

    Args:
        num_items: Catalog size I.
    """

    def __init__(self, num_items: int) -> None:
        _check_at_least_one(num_items=num_items)
        self.num_items = num_items
        self.counts = torch.zeros(num_items)

    def fit(self, sequences: Sequence[Sequence[int]]) -> "Popularity":
        """Count the events of sequences of catalog indices; a DataError names indices outside the catalog.

        For test rows these are the training and validation events, for validation rows the training events.
        """
        _, items = _flatten(sequences, self.num_items)
        self.counts = torch.from_numpy(np.bincount(items, minlength=self.num_items).astype(np.float32))
        return self

    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Return the counts for every row [B, I], whatever its history."""
        return self.counts.expand(len(item_indices), -1).clone()


class ItemKNN:
    """Score items by their tf-idf weighted cosine with the items of the history, recent ones counting more.

    With `W[i, u] = sqrt(count of i in u) * log(I / (1 + number of items of u))` (a user of many items says less about
    each) and `s(i, j) = cos(W[i], W[j])`, kept for the `neighbors` nearest of each item:
    `score(j) = sum over the history of decay^age * s(i_age, j)`, age 0 being the last item.

    Args:
        num_items: Catalog size I.
        neighbors: Nearest items kept for each item; an item is no neighbor of itself.
        decay: Weight of an item relative to the one after it, in (0, 1].
    """

    def __init__(self, num_items: int, neighbors: int = 100, decay: float = 0.7) -> None:
        _check_at_least_one(num_items=num_items, neighbors=neighbors)
        if not 0 < decay <= 1:
            raise ConfigurationError(f"decay must be in (0, 1], got {decay!r}")
        self.num_items = num_items
        self.neighbors = min(neighbors, num_items)
        self.decay = decay
        self.neighbor_items = np.zeros((num_items, self.neighbors), dtype=np.int32)  # [I, neighbors]
        self.similarities = np.zeros((num_items, self.neighbors), dtype=np.float32)  # [I, neighbors]

    def fit(self, sequences: Sequence[Sequence[int]]) -> "ItemKNN":
        """Find every item's nearest items, in sequences as `Popularity.fit` has."""
        users, items = _flatten(sequences, self.num_items)
        pairs, counts = np.unique(users * self.num_items + items, return_counts=True)
        users, items = pairs // self.num_items, pairs % self.num_items  # sorted by user
        items_of_user = np.bincount(users, minlength=len(sequences))
        idf = np.maximum(np.log(self.num_items) - np.log1p(items_of_user), 0.0)
        weights = np.sqrt(counts) * idf[users]
        norms = np.sqrt(np.bincount(items, weights**2, minlength=self.num_items))
        weights = weights / np.maximum(norms[items], np.finfo(np.float64).tiny)

        by_user = csr_array((weights, (items, users)), shape=(self.num_items, len(sequences)))
        lists = NeighborLists.nearest(by_user, by_user, self.neighbors, itself=False)
        self.neighbor_items, self.similarities = lists.items, lists.similarities
        return self

    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Score every item [B, I] by its similarity to the history; 0 for items near to none of it.

        Args:
            item_indices: `[B, N]` catalog indices, oldest first; those outside the catalog count as masked.
            mask: `[B, N]`, true or 1 at real items.

        Raises:
            InputError: Shapes do not fit.
        """
        histories = Histories(item_indices, mask, self.num_items)
        return torch.from_numpy(histories.whole(self.cells(histories)).astype(np.float32))

    def cells(self, histories: Histories) -> Cells:
        """Return the scores that are above 0."""
        return self.lists.scores(histories, self.decay ** histories.ages.astype(np.float64))

    @property
    def lists(self) -> NeighborLists:
        """The neighbors of each item."""
        return NeighborLists(self.neighbor_items, self.similarities)


def _flatten(sequences: Sequence[Sequence[int]], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the user's position and the item of every event."""
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    items = np.fromiter((item for sequence in sequences for item in sequence), dtype=np.int64, count=len(users))
    outside = items[(items < 0) | (items >= num_items)]
    if outside.size:
        raise DataError(
            f"sequences hold catalog indices {outside[:5].tolist()} outside 0 to {num_items - 1}; "
            "build the model with the size of this catalog"
        )
    return users, items


def _check_at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value!r}")
