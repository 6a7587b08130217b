"""The part `item_knn`: how near an item is to those of the history, by who bought both."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigurationError
from ..counting import ItemKNN
from ..histories import Cells, Histories
from ..neighbors import NeighborLists
from .part import Part, Sources, column, register_part

SLOPE = 0.2
DECAY = 0.7


@register_part("item_knn")
class ItemKNNPart(Part):
    """`phi(j, h) = log(1 + .2 s(h, j) / sd(s(h, .)))`, s the score of `ItemKNN`, sd over the items of a row that were
    there when it was fitted.

    An item without neighbors, as a new one is, has 0 as most items have. Needs counts.
    """

    sparse = ("item_knn",)
    counts = True

    def __init__(self, lists: NeighborLists, num_fitted: int) -> None:
        self.lists, self.num_fitted = lists, num_fitted

    @classmethod
    def fit(cls, sources: Sources) -> "ItemKNNPart":
        """Count who bought both."""
        if sources.sequences is None:
            raise ConfigurationError("the part item_knn counts in sequences, which were not given")
        num_items = len(sources.items)
        return cls(ItemKNN(num_items, decay=DECAY).fit(sources.sequences).lists, num_items)

    def cells(self, histories: Histories) -> Cells:
        """Return the items near to a history."""
        found = self.lists.scores(histories, DECAY ** histories.ages.astype(np.float64))
        sums, squares = (
            np.bincount(found.rows, found.values**power, len(histories)) / self.num_fitted for power in (1, 2)
        )
        spread = np.sqrt(np.maximum(squares - sums**2, np.finfo(np.float64).tiny))  # [B]
        return column(found._replace(values=np.log1p(SLOPE * found.values / spread[found.rows])))

    def extended(self, sources: Sources, num_known: int) -> "ItemKNNPart":
        """Return the part with items that are near to none."""
        return ItemKNNPart(self.lists.padded(len(sources.items)), self.num_fitted)

    def tensors(self) -> dict[str, Tensor]:
        """Return the lists, and how many items they were made of."""
        return {**self.lists.tensors(), "fitted": torch.tensor(self.num_fitted)}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], sources: Sources) -> "ItemKNNPart":
        """Take the lists."""
        num_items = len(sources.items)
        return cls(NeighborLists.of(tensors, num_items), int(tensors.get("fitted", num_items)))
