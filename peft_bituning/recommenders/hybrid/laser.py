"""The part `laser`: how near an item's embedding is to the user's, by the trained adapter."""

from torch import Tensor

from ..histories import Histories
from .part import EmbeddingRecommender, Part, Sources, register_part

TEMPERATURE = 0.05


@register_part("laser")
class LaserPart(Part):
    """`phi(j, h) = cos(h_u, h_j) / .05` (paper Eq. 3). Needs the adapter, which embeds new items as well."""

    dense = ("laser",)

    def __init__(self, recommender: EmbeddingRecommender) -> None:
        self.recommender = recommender
        self.item_vectors = recommender.item_embeddings.float().cpu()

    @classmethod
    def fit(cls, sources: Sources) -> "LaserPart | None":
        """Take the adapter as it is."""
        return None if sources.laser is None else cls(sources.laser)

    def queries(self, histories: Histories) -> Tensor:
        """Return the users' embeddings over the temperature `[1, B, D]`."""
        users = histories.embeddings
        if users is None:
            users = self.recommender.user_embeddings(histories.as_lists())
        return users.float().cpu()[None] / TEMPERATURE
