"""Neighbor lists: for each item of a catalog the nearest others and how near they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError
from .histories import Cells, Histories

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class NeighborLists:
    """The nearest items of each, `[I, n]` both; where an item has fewer, the rest has similarity 0."""

    items: np.ndarray  # int32
    similarities: np.ndarray  # float32

    def __len__(self) -> int:
        """Return I."""
        return len(self.items)

    @classmethod
    def nearest(cls, rows: Any, others: Any, number: int, itself: bool = True) -> "NeighborLists":
        """Find the nearest by inner product, of those above 0; ties go to the lower index.

        Args:
            rows: sparse vectors `[J, V]` whose neighbors are found.
            others: sparse vectors `[I, V]` they are found among.
            number: n.
            itself: keep a row's own place among the others, which then are the rows.
        """
        found = np.zeros((rows.shape[0], number), np.int32)
        similarities = np.zeros((rows.shape[0], number), np.float32)
        transposed = others.T.tocsr()
        for start in range(0, rows.shape[0], ROWS_AT_ONCE):
            products = (rows[start : start + ROWS_AT_ONCE] @ transposed).tocsr()
            products.sort_indices()
            for row, (low, high) in enumerate(zip(products.indptr[:-1], products.indptr[1:], strict=True), start):
                values, places = products.data[low:high], products.indices[low:high]
                if not itself:
                    values = np.where(places == row, 0.0, values)
                order = np.argsort(-values, kind="stable")[:number]
                order = order[values[order] > 0]
                found[row, : len(order)], similarities[row, : len(order)] = places[order], values[order]
        return cls(found, similarities)

    def scores(self, histories: Histories, weights: np.ndarray) -> Cells:
        """Score items by the events of histories, weights `[E]`: `score(j) = sum of weight * s(i, j)`, where not 0."""
        near, values = self.items[histories.items], self.similarities[histories.items].astype(np.float64)
        values = weights[:, None] * values  # [E, n]
        counts = values != 0
        rows = np.broadcast_to(histories.rows[:, None], counts.shape)
        return histories.summed(rows[counts], near[counts], values[counts])

    def padded(self, num_items: int) -> "NeighborLists":
        """Return the lists of a catalog that has grown to `num_items`, whose new items are near to none."""
        missing = ((0, num_items - len(self)), (0, 0))
        return NeighborLists(np.pad(self.items, missing), np.pad(self.similarities, missing))

    def resized(self, number: int) -> "NeighborLists":
        """Return lists of another length n."""
        missing = ((0, 0), (0, max(0, number - self.items.shape[1])))
        return NeighborLists(np.pad(self.items, missing)[:, :number], np.pad(self.similarities, missing)[:, :number])

    def joined(self, items: np.ndarray, similarities: np.ndarray) -> "NeighborLists":
        """Return lists of the same length that take in more neighbors `[I, m]` where these are nearer."""
        all_items = np.concatenate([self.items, items], axis=1)
        all_similarities = np.concatenate([self.similarities, similarities], axis=1)
        order = np.argsort(-all_similarities, axis=1, kind="stable")[:, : self.items.shape[1]]
        return NeighborLists(
            np.take_along_axis(all_items, order, 1), np.take_along_axis(all_similarities, order, 1).astype(np.float32)
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the lists as tensors, items as int32."""
        return {"items": torch.from_numpy(self.items), "similarities": torch.from_numpy(self.similarities)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], num_items: int) -> "NeighborLists":
        """Build what `tensors` returned; an `ArtifactError` says that the tensors are no lists of so many items."""
        items, similarities = (tensors.get(name, torch.empty(0)) for name in ("items", "similarities"))
        if items.ndim != 2 or items.shape != similarities.shape or len(items) != num_items:
            raise ArtifactError(
                f"neighbor lists must be items and similarities [{num_items}, n], got {list(items.shape)} and "
                f"{list(similarities.shape)}; save the folder again"
            )
        if bool(((items < 0) | (items >= num_items)).any()) or not bool(similarities.isfinite().all()):
            raise ArtifactError("neighbor lists must name items of the catalog and be finite; save the folder again")
        return cls(items.int().numpy(), similarities.float().numpy())
