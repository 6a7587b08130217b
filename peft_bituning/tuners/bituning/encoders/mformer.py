"""M-Former: a mixture of query experts in a querying transformer (paper Section 3.2)."""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from ...rows.collaborative import fill_cold_rows, masked_mean
from ..config import BiTuningConfig
from .base import Prefix, PrefixEncoder
from .registry import register_prefix_encoder


@register_prefix_encoder("mformer")
class MFormer(PrefixEncoder):
    """Routes each row to one of K query experts, whose P tokens query the row's collaborative embeddings.

    `r(u) = mean_i softmax(C_u W_r^T)` (Eqs. 5-7); the expert with the highest r gives the queries, the querying
    transformer reads `C_u`, a linear layer takes H to D. The choice is hard, so `router_gradient` says how the
    recommendation loss reaches `W_r`: the *projected* prefix is multiplied by r_max (`switch`), by
    r_max / stop_gradient(r_max) (`straight_through`, which leaves the forward pass as it is), or not (`none`).
    Where the settings name the tokens to start from, a trainable anchor [P, D] that starts as their embeddings is
    added to the prefix. Its arguments are those of `PrefixEncoder`.

    Raises:
        ConfigurationError: a cross-attention frequency that leaves the first block without cross-attention.
    """

    needs_collaborative = True

    def __init__(self, config: BiTuningConfig, token_dim: int, scale: float) -> None:
        super().__init__(config, token_dim, scale)
        hidden = config.encoder_hidden_size
        self.router = nn.Linear(self.collaborative_dim, config.num_experts, bias=False)
        self.null = nn.Parameter(torch.empty(self.collaborative_dim))
        # One tensor: experts that no row of a batch chose still take part in the gradient (DDP).
        self.queries = nn.Parameter(torch.empty(config.num_experts, config.num_virtual_tokens, hidden))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=hidden,
                num_hidden_layers=config.encoder_num_layers,
                num_attention_heads=config.encoder_num_attention_heads,
                intermediate_size=config.encoder_intermediate_size or 4 * hidden,
                cross_attention_frequency=config.encoder_cross_attention_frequency,
                encoder_hidden_size=self.collaborative_dim,
                hidden_dropout_prob=config.encoder_dropout,
                attention_probs_dropout_prob=config.encoder_dropout,
                use_qformer_text_input=False,
                initializer_range=hidden**-0.5,
            )
        )
        self.projection = nn.Linear(hidden, token_dim)
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.normal_(self.null, std=0.02)
        nn.init.normal_(self.queries, std=0.02)
        # The stack ends in a LayerNorm, so its states have unit scale.
        nn.init.normal_(self.projection.weight, std=scale * hidden**-0.5)
        nn.init.zeros_(self.projection.bias)
        self.anchor: nn.Parameter | None = None
        if config.prefix_token_ids is not None:
            self.anchor = nn.Parameter(torch.zeros(config.num_virtual_tokens, token_dim))

    @torch.no_grad()
    def start_from(self, tokens: Tensor) -> None:
        """Start the anchor, which every row's prefix is added to, from token embeddings [P, D]."""
        if self.anchor is not None:
            self.anchor.copy_(tokens)

    def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
        """Choose an expert for each row and let it query the row's items; see `PrefixEncoder.forward`."""
        if embeds is None or mask is None:
            raise TypeError("MFormer needs collaborative_embeds and collaborative_mask")
        mask = self.drop(mask)
        embeds, filled = fill_cold_rows(embeds, mask, self.null)
        logits = self.router(embeds)  # [B, N, K]
        scores = row_scores(logits, filled)  # r: [B, K]
        best, expert = scores.max(-1)  # [B]
        states = self.qformer(
            query_embeds=self.queries[expert],  # [B, P, H]
            encoder_hidden_states=embeds,
            encoder_attention_mask=filled.long(),
        ).last_hidden_state
        prefix = self.projection(states)  # [B, P, D]
        if self.config.router_gradient == "switch":
            prefix = prefix * best.view(-1, 1, 1)
        elif self.config.router_gradient == "straight_through":
            prefix = prefix * (best / best.detach()).view(-1, 1, 1)
        if self.anchor is not None:
            prefix = prefix + self.anchor
        return Prefix(prefix, logits.masked_fill(~mask.unsqueeze(-1), 0.0), mask)


def row_scores(router_logits: Tensor, mask: Tensor) -> Tensor:
    """Score the experts for each row: `r_j = mean_i softmax(m_i)_j` (paper Eqs. 6-7).

    Args:
        router_logits: `m(u)` [B, N, K].
        mask: which items are real [B, N] bool; every row has at least one.

    Returns:
        r [B, K].
    """
    return masked_mean(router_logits.softmax(-1), mask)
