"""The prefix encoder: what makes the prefix of each row."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....errors import ConfigurationError
from ...rows.collaborative import check_collaborative, drop_rows
from ..config import BiTuningConfig


class Prefix(NamedTuple):
    """What a prefix encoder returns; a tuple, as DeepSpeed's hooks find the tensors of no other class.

    Args:
        embeddings: the prefix tokens [B, P, D]; None where P is 0.
        router_logits: the router's scores [B, N, K], zero at padding; None without a router.
        router_mask: the items that count in load balancing [B, N] bool; None without a router.
        is_shared: whether every row has the same prefix: it is then run through the language model once a batch.
    """

    embeddings: Tensor | None
    router_logits: Tensor | None = None
    router_mask: Tensor | None = None
    is_shared: bool = False


class PrefixEncoder(nn.Module):
    """Makes the prefix of each row; subclass it, and name it with `register_prefix_encoder`.

    A subclass says whether it reads a recommender (`needs_collaborative`).

    Args:
        config: the adapter's settings.
        token_dim: D.
        scale: standard deviation the prefix tokens start with.

    Raises:
        ConfigurationError: it reads a recommender, and `collaborative_dim` is missing.
    """

    needs_collaborative: bool = False

    def __init__(self, config: BiTuningConfig, token_dim: int, scale: float) -> None:
        super().__init__()
        if self.needs_collaborative and config.collaborative_dim is None:
            raise ConfigurationError(
                f"collaborative_dim must be set for prefix_encoder={config.prefix_encoder!r}, got None; give the width "
                "of the recommender's embeddings (`recommender.embedding_dim`)"
            )
        self.config = config
        self.collaborative_dim = config.collaborative_dim or 0
        self.token_dim = token_dim
        self.scale = scale

    @property
    def num_tokens(self) -> int:
        """P, the number of prefix tokens."""
        return self.config.num_virtual_tokens

    def start_from(self, tokens: Tensor) -> None:
        """Start the prefix from given token embeddings; an encoder that can do so overrides this.

        Args:
            tokens: [P, D].

        Raises:
            ConfigurationError: this encoder's prefix cannot start from tokens.
        """
        raise ConfigurationError(
            f"prefix_token_ids must be None for prefix_encoder={self.config.prefix_encoder!r}, which has no "
            f"`start_from`, got {self.config.prefix_token_ids!r}"
        )

    def read(
        self, batch_size: int, embeds: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Check the collaborative inputs of a batch; see `check_collaborative`, whose arguments these are.

        Returns:
            `C_u` [B, N, C] and mask [B, N]; (None, None) where this encoder reads none.
        """
        if not self.needs_collaborative:
            return None, None
        reader = f"prefix_encoder={self.config.prefix_encoder!r}"
        dtype = next((parameter.dtype for parameter in self.parameters()), torch.float32)
        return check_collaborative(reader, self.collaborative_dim, dtype, batch_size, embeds, mask)

    def drop(self, mask: Tensor) -> Tensor:
        """Hide all items of some rows [B, N] in training, by `collaborative_dropout`."""
        return drop_rows(mask, self.config.collaborative_dropout if self.training else 0.0)

    def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
        """Make the prefix of every row.

        Args:
            batch_size: B.
            embeds: `C_u` [B, N, C], zero at padding; None only where `needs_collaborative` is False.
            mask: which items are real [B, N] bool, with `embeds`.

        Returns:
            The prefix.
        """
        raise NotImplementedError
