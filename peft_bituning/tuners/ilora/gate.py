"""The gate: from what a frozen recommender says of a row to the weights of the experts."""

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError
from ..rows.collaborative import check_collaborative, drop_rows, fill_cold_rows, masked_mean
from .config import ILoRAConfig

NULL_SCALE = 0.02


class InstanceGate(nn.Linear):
    """`g = softmax(W_g h_u)`, where `h_u` is the last or the mean real state of `C_u`, or the learned `null` [C].

    Raises:
        ConfigurationError: `collaborative_dim` is missing.
    """

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
        """Weigh the experts [B, K], in sum 1, by `C_u` [B, N, C] and mask [B, N] bool; cold rows take `null`."""
        mask = drop_rows(mask, self.collaborative_dropout if self.training else 0.0)
        embeds, mask = fill_cold_rows(embeds, mask, self.null)
        if self.pooling == "mean":
            state = masked_mean(embeds, mask)  # [B, C]
        else:
            columns = torch.arange(mask.shape[1], device=mask.device)
            newest = torch.where(mask, columns, -1).argmax(1)  # [B]
            state = embeds[torch.arange(mask.shape[0], device=mask.device), newest]  # [B, C]
        return super().forward(state).softmax(-1)

    def read(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check the collaborative inputs of a batch; see `check_collaborative`, whose arguments these are."""
        reader = "iLoRA, whose gate reads them"
        return check_collaborative(reader, self.in_features, self.weight.dtype, batch_size, embeds, mask)
