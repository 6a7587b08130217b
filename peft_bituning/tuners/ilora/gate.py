"""The gate: from what a frozen recommender says of a row to the weights of the experts."""

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError, InputError
from ..bituning.encoders.base import fill_cold_rows, masked_mean
from .config import ILoRAConfig

NULL_SCALE = 0.02


class InstanceGate(nn.Linear):
    """`g = softmax(W_g h_u)`, where `h_u` is the last or the mean real state of `C_u`, or the learned `null` [C].

    Args:
        config: the adapter's settings.

    Raises:
        ConfigurationError: `collaborative_dim` is missing.
    """

    # What training asks of whatever reads `C_u`: whether it needs it, and how many tokens it puts before the text.
    needs_collaborative = True
    num_tokens = 0

    def __init__(self, config: ILoRAConfig) -> None:
        if config.collaborative_dim is None:
            raise ConfigurationError(
                "collaborative_dim must be set for iLoRA, got None; give the width of the recommender's embeddings "
                "(`recommender.embedding_dim`)"
            )
        super().__init__(config.collaborative_dim, config.num_experts, bias=False)
        self.null = nn.Parameter(torch.empty(config.collaborative_dim))
        nn.init.normal_(self.null, std=NULL_SCALE)
        self.pooling = config.gate_pooling
        self.collaborative_dropout = config.collaborative_dropout

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # a row's states, not inputs
        """Weigh the experts of every row.

        Args:
            embeds: `C_u` [B, N, C], zero at padding.
            mask: which of its rows are real [B, N] bool; rows with none take `null`.

        Returns:
            The gates [B, K]; each row adds up to 1.
        """
        if self.training and self.collaborative_dropout > 0:
            mask = mask & (torch.rand(mask.shape[0], 1, device=mask.device) >= self.collaborative_dropout)
        embeds, mask = fill_cold_rows(embeds, mask, self.null)
        if self.pooling == "mean":
            state = masked_mean(embeds, mask)  # [B, C]
        else:
            columns = torch.arange(mask.shape[1], device=mask.device)
            newest = torch.where(mask, columns, -1).argmax(1)  # [B]
            state = embeds[torch.arange(mask.shape[0], device=mask.device), newest]  # [B, C]
        return super().forward(state).softmax(-1)

    def check(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check the collaborative inputs of a batch and make padding inert.

        Args:
            batch_size: B.
            embeds: `C_u` [B, N, C]; padding may hold anything, NaN too.
            mask: which of its rows are real [B, N], int or bool; None means all of them.

        Returns:
            `C_u` in the gate's type, zero at padding, and the mask as bool.

        Raises:
            InputError: they are missing, of the wrong shape, or not finite.
        """
        width = self.in_features
        if embeds is None:
            raise InputError(
                f"collaborative_embeds must be given to iLoRA, whose gate reads them, got None; pass the recommender's "
                f"embeddings [B, N, {width}], and a collaborative_mask of zeros for rows that have none"
            )
        if embeds.ndim != 3 or embeds.shape[0] != batch_size or embeds.shape[2] != width:
            raise InputError(
                f"collaborative_embeds must be [B, N, C] = [{batch_size}, N, {width}], got {list(embeds.shape)}; pass "
                "those of the recommender that the adapter was made for, or set collaborative_dim to its embedding_dim"
            )
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if mask.shape != embeds.shape[:2]:
            raise InputError(
                f"collaborative_mask must be [B, N] = {list(embeds.shape[:2])}, got {list(mask.shape)}; give one value "
                "an item of collaborative_embeds, 0 at padding"
            )
        if embeds.shape[1] == 0:
            embeds, mask = embeds.new_zeros(batch_size, 1, width), mask.new_zeros(batch_size, 1)
        mask = mask.bool()
        embeds = embeds.to(self.weight.dtype).masked_fill(~mask.unsqueeze(-1), 0.0)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(embeds).all()):
            rows = torch.nonzero(~torch.isfinite(embeds).flatten(1).all(1)).flatten().tolist()
            raise InputError(
                f"collaborative_embeds must be finite at real items, got NaN or infinity in rows {rows[:10]}; check "
                "the recommender they come from"
            )
        return embeds, mask
