"""Histories as events: what everything that counts over a history reads of a padded batch."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..errors import InputError


class Cells(NamedTuple):
    """Single places of a score matrix `[B, I]`, each once, in the order of rows, then items."""

    rows: np.ndarray  # [M]
    items: np.ndarray  # [M]
    values: np.ndarray  # [M], or [M, F] for F features


class Histories:
    """The real events of B histories, row by row, oldest first; items outside the catalog count as masked.

    Args:
        item_indices: `[B, N]` catalog indices, oldest first.
        mask: `[B, N]`, true or 1 at real items.
        num_items: Catalog size I.
        embeddings: `[B, D]` of length 1, the users' by an adapter, where they are at hand; see `LaserPart`.

    Raises:
        InputError: Shapes do not fit.
    """

    def __init__(self, item_indices: Tensor, mask: Tensor, num_items: int, embeddings: Tensor | None = None) -> None:
        if item_indices.ndim != 2 or mask.shape != item_indices.shape:
            raise InputError(
                "item_indices and mask must both have shape [rows, history length], "
                f"got {list(item_indices.shape)} and {list(mask.shape)}"
            )
        self.item_indices, self.mask, self.num_items = item_indices, mask, num_items
        self.embeddings = embeddings
        indices = item_indices.cpu().numpy()
        real = mask.cpu().bool().numpy() & (indices >= 0) & (indices < num_items)
        self.rows, columns = np.nonzero(real)  # [E]
        self.items = indices[self.rows, columns]  # [E]
        ages = np.cumsum(real[:, ::-1], axis=1)[:, ::-1] - 1
        self.ages = ages[self.rows, columns]  # [E], 0 at a row's last item

    def __len__(self) -> int:
        """Return B."""
        return len(self.item_indices)

    def as_lists(self) -> list[list[int]]:
        """Return the items of each row, oldest first."""
        ends = np.cumsum(np.bincount(self.rows, minlength=len(self)))
        return [part.tolist() for part in np.split(self.items, ends[:-1])] if len(self) else []

    @cached_property
    def seen(self) -> Cells:
        """1 at every item of a history."""
        found = self.summed(self.rows, self.items, np.ones(len(self.rows)))
        return found._replace(values=np.ones(len(found.rows)))

    @cached_property
    def last(self) -> Cells:
        """1 at the last item of a history."""
        is_last = self.ages == 0
        return Cells(self.rows[is_last], self.items[is_last], np.ones(int(is_last.sum())))

    def summed(self, rows: np.ndarray, items: np.ndarray, values: np.ndarray) -> Cells:
        """Add up what falls on the same cell, in the order given."""
        keys, places = np.unique(rows * self.num_items + items, return_inverse=True)
        return Cells(keys // self.num_items, keys % self.num_items, np.bincount(places, values, len(keys)))

    def whole(self, cells: Cells) -> np.ndarray:
        """Return the matrix `[B, I]` float64 that has zeros everywhere else."""
        matrix = np.zeros((len(self), self.num_items))
        matrix[cells.rows, cells.items] = cells.values
        return matrix
