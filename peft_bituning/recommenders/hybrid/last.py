"""The part `last`: whether an item is the last one of a history."""

from ..histories import Cells, Histories
from .part import Part, Sources, column, register_part


@register_part("last")
class LastPart(Part):
    """`phi(j, h) = 1` where j is the last item of h, else 0. Needs nothing."""

    sparse = ("last",)

    @classmethod
    def fit(cls, sources: Sources) -> "LastPart":
        """Take nothing."""
        return cls()

    def cells(self, histories: Histories) -> Cells:
        """Return the last item of each history."""
        return column(histories.last)
