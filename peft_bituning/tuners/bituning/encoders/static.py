"""Prefixes that are the same for every row."""

import torch
from torch import Tensor, nn

from ..config import BiTuningConfig
from .base import Prefix, PrefixEncoder
from .registry import register_prefix_encoder


@register_prefix_encoder("static")
class StaticPrefix(PrefixEncoder):
    """P trainable vectors: Bi-Tuning without collaborative information (paper Section 3.1.2).

    Its arguments are those of `PrefixEncoder`.
    """

    def __init__(self, config: BiTuningConfig, token_dim: int, scale: float) -> None:
        super().__init__(config, token_dim, scale)
        self.embeddings = nn.Parameter(torch.empty(config.num_virtual_tokens, token_dim))
        nn.init.normal_(self.embeddings, std=scale)

    @torch.no_grad()
    def start_from(self, tokens: Tensor) -> None:
        """Start the trainable vectors from token embeddings [P, D]."""
        self.embeddings.copy_(tokens)

    def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
        """Repeat the trainable vectors for every row; see `PrefixEncoder.forward`."""
        return Prefix(self.embeddings.unsqueeze(0).expand(batch_size, -1, -1), is_shared=True)


@register_prefix_encoder("none")
class NoPrefix(PrefixEncoder):
    """No prefix at all: the suffix alone is trained (paper Table 4, "w/o prefix")."""

    @property
    def num_tokens(self) -> int:
        """P = 0."""
        return 0

    def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
        """Return an empty prefix; see `PrefixEncoder.forward`."""
        return Prefix(None, is_shared=True)
