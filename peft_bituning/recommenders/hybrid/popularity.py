"""The part `popularity`: how often an item was bought, whatever the history."""

import torch
from torch import Tensor

from ..histories import Histories
from .part import Part, Sources, register_part


@register_part("popularity")
class PopularityPart(Part):
    """`phi(j, h) = log(1 + count of j) - mean of it over bought items`; 0 for items that nobody bought.

    Needs counts.
    """

    dense = ("popularity",)
    counts = True

    def __init__(self, item_vectors: Tensor) -> None:
        self.item_vectors = item_vectors  # [I, 1]

    @classmethod
    def fit(cls, sources: Sources) -> "PopularityPart":
        """Take the counts."""
        return cls(sources.without_mean(sources.counts.float().log1p()[:, None]))

    def queries(self, histories: Histories) -> Tensor:
        """Return ones `[1, B, 1]`."""
        return torch.ones(1, len(histories), 1)
