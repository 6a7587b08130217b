"""One linear projection of the pooled collaborative embeddings, as the paper's rivals do it."""

import torch
from torch import Tensor, nn

from ...rows.collaborative import fill_cold_rows, masked_mean
from ..config import BiTuningConfig
from .base import Prefix, PrefixEncoder
from .registry import register_prefix_encoder


@register_prefix_encoder("linear")
class LinearEncoder(PrefixEncoder):
    """`P = W mean(C_u) + b`, cut into P tokens (the "unified linear projection" of paper Section 3.2).

    Its arguments are those of `PrefixEncoder`.
    """

    needs_collaborative = True

    def __init__(self, config: BiTuningConfig, token_dim: int, scale: float) -> None:
        super().__init__(config, token_dim, scale)
        self.null = nn.Parameter(torch.empty(self.collaborative_dim))
        self.projection = nn.Linear(self.collaborative_dim, config.num_virtual_tokens * token_dim)
        nn.init.normal_(self.null, std=0.02)
        nn.init.normal_(self.projection.weight, std=scale * self.collaborative_dim**-0.5)
        nn.init.normal_(self.projection.bias, std=scale)

    @torch.no_grad()
    def start_from(self, tokens: Tensor) -> None:
        """Start `b` from token embeddings [P, D]."""
        self.projection.bias.copy_(tokens.flatten())

    def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
        """Project the mean of the row's items; see `PrefixEncoder.forward`."""
        if embeds is None or mask is None:
            raise TypeError("LinearEncoder needs collaborative_embeds and collaborative_mask")
        mask = self.drop(mask)
        pooled = masked_mean(*fill_cold_rows(embeds, mask, self.null))  # [B, C]
        return Prefix(self.projection(pooled).view(batch_size, self.num_tokens, self.token_dim))
