"""The center of an adapter's embeddings, which is taken off them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingCenter(nn.Module):
    """Takes what all embeddings have in common off each of them: `h / |h| - c`.

    States of a language model point much the same way: the mean c of unit embeddings is nearly of length 1 itself, so
    that all cosines are near 1. The vector is no trained weight; training moves it to the mean of the items' unit
    embeddings whenever it encodes them, and it is saved with the adapter. At first it is zero.

    Args:
        width: D.
    """

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(width))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Center embeddings.

        Args:
            embeddings: [B, D], any float dtype and length.

        Returns:
            [B, D] float32: in half precision little would be left of a difference of nearly equal vectors.
        """
        return F.normalize(embeddings.float(), dim=-1) - self.weight.float()

    def move(self, embeddings: Tensor) -> Tensor:
        """Move the center to the mean of embeddings [M, D] that `forward` returned.

        Returns:
            What `forward` returns of the same rows from now on [M, D].
        """
        mean = embeddings.mean(0)
        with torch.no_grad():
            self.weight.add_(mean.to(self.weight))
        return embeddings - mean
