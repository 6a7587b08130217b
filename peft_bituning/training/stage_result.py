"""Results of a stage: weights, and the item table they speak to."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..catalog.item_table import ItemTable

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class ItemSide:
    """An item table and the weights that encoded it.

    Args:
        epoch: the epoch of stage 1, from 1, that began with it.
        weights: A.
        table: the item table.
    """

    epoch: int
    weights: Weights
    table: ItemTable

    def to_tensors(self) -> Weights:
        """Return everything as tensors for one file."""
        return {"table": self.table.embeddings, **{f"weights.{name}": value for name, value in self.weights.items()}}

    @classmethod
    def from_tensors(cls, epoch: int, tensors: Weights) -> "ItemSide":
        """Build the item side from what `to_tensors` returned."""
        weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name != "table"}
        # In memory of its own: where a mapped file places the table changes the last bits of products with it.
        return cls(epoch, weights, ItemTable(tensors["table"].clone()))


@dataclass(frozen=True)
class StageResult:
    """The best epoch of a stage.

    Args:
        user_weights: A', the adapter of that epoch.
        item_side: the item table it was validated on, and A, which encoded it.
        epoch: number of that epoch in its stage, from 1.
        valid: its validation metrics.
    """

    user_weights: Weights
    item_side: ItemSide
    epoch: int
    valid: dict[str, Any]
