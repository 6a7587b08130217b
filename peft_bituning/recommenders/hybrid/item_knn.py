"""The part `item_knn`: how near an item is to those of the history, by who bought both."""

from collections.abc import Mapping

import numpy as np
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
    """`phi(j, h) = log(1 + .2 s(h, j) / sd(s(h, .)))`, s the score of `ItemKNN`, sd over the I items of a row.

    An item without neighbors, as a new one is, has 0 as most items have. Needs counts.
    """

    sparse = ("item_knn",)

    def __init__(self, lists: NeighborLists) -> None:
        self.lists = lists

    @classmethod
    def fit(cls, sources: Sources) -> "ItemKNNPart":
        """Count who bought both."""
        if sources.sequences is None:
            raise ConfigurationError("the part item_knn counts in sequences, which were not given")
        return cls(ItemKNN(len(sources.items), decay=DECAY).fit(sources.sequences).lists)

    def cells(self, histories: Histories) -> Cells:
        """Return the items near to a history."""
        found = self.lists.scores(histories, DECAY ** histories.ages.astype(np.float64))
        sums, squares = (
            np.bincount(found.rows, found.values**power, len(histories)) / histories.num_items for power in (1, 2)
        )
        spread = np.sqrt(np.maximum(squares - sums**2, np.finfo(np.float64).tiny))  # [B]
        return column(found._replace(values=np.log1p(SLOPE * found.values / spread[found.rows])))

    def extended(self, sources: Sources, num_known: int) -> "ItemKNNPart":
        """Return the part with items that are near to none."""
        return ItemKNNPart(self.lists.padded(len(sources.items)))

    def tensors(self) -> dict[str, Tensor]:
        """Return the lists."""
        return self.lists.tensors()

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], sources: Sources) -> "ItemKNNPart":
        """Take the lists."""
        return cls(NeighborLists.of(tensors, len(sources.items)))
