"""The part `sequence`: what the frozen ID recommender expects next."""

import torch
from torch import Tensor

from ..histories import Histories
from .part import Part, Sources, register_part


@register_part("sequence")
class SequencePart(Part):
    """`phi(j, h) = s(h, j) - mean over bought items of s(h, .)`, s the ID recommender's scores.

    A log-softmax differs from it by one number per row, which no ranking and no likelihood sees. An item that nobody
    bought has an untrained vector, and the mean, 0, in its place. Needs the ID recommender.
    """

    dense = ("sequence",)
    counts = True

    def __init__(self, sources: Sources) -> None:
        recommender = sources.sequence
        if recommender is None:
            raise ValueError("the part needs an ID recommender")
        self.recommender = recommender
        weights = recommender.item_weights.detach().float().cpu()
        bias = recommender.output_bias
        bias = torch.zeros(len(weights)) if bias is None else bias.detach().float().cpu()
        known = torch.cat([weights, bias[:, None]], dim=1)  # [I, C + 1]
        vectors = known.new_zeros(len(sources.counts), known.shape[1])  # a catalog may have grown since
        vectors[: len(known)] = known
        self.item_vectors = sources.without_mean(vectors)

    @classmethod
    def fit(cls, sources: Sources) -> "SequencePart | None":
        """Take the recommender as it is."""
        return None if sources.sequence is None else cls(sources)

    def queries(self, histories: Histories) -> Tensor:
        """Return `[1, B, C + 1]`: the recommender's own, and 1 for the bias."""
        device = self.recommender.item_weights.device
        states = self.recommender.queries(histories.item_indices.to(device), histories.mask.to(device)).cpu()
        return torch.cat([states, torch.ones(len(states), 1)], dim=1)[None]
