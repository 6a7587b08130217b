"""The part `seen`: whether the history holds an item."""

from ..histories import Cells, Histories
from .part import Part, Sources, column, register_part


@register_part("seen")
class SeenPart(Part):
    """`phi(j, h) = 1` where j is in h, else 0. Needs nothing."""

    sparse = ("seen",)

    @classmethod
    def fit(cls, sources: Sources) -> "SeenPart":
        """Take nothing."""
        return cls()

    def cells(self, histories: Histories) -> Cells:
        """Return the items of the histories."""
        return column(histories.seen)
