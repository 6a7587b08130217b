"""BERT4Rec: a bidirectional transformer that fills in masked items.

Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer", CIKM
2019. Shapes: `B` rows, `N` history length, `L` packed length, `C` width, `I` catalog items, `M` masked positions.
"""

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from ..errors import ConfigurationError
from .base import evaluation_mode, mask_of_lengths, pack_histories
from .transformer import ItemSequenceConfig, ItemSequenceModel


class BERT4RecConfig(ItemSequenceConfig):
    """Sizes of a `BERT4Rec`.

    Args:
        mask_probability: Share of the items hidden in training (the cloze task).
        last_item_probability: Share of the training rows in which the last item alone is hidden, as at inference.
        cut_probability: Share of the training rows cut to a random length first, so that any item can be the last.
        dropout: Probability for embeddings and sublayers in training.
        attention_dropout: Probability for attention weights in training.
        arguments: See `ItemSequenceConfig`.
    """

    model_type = "bert4rec"

    def __init__(
        self,
        mask_probability: float = 0.3,
        last_item_probability: float = 0.3,
        cut_probability: float = 0.5,
        dropout: float = 0.2,
        attention_dropout: float = 0.2,
        **arguments: Any,
    ) -> None:
        self.mask_probability = mask_probability
        self.last_item_probability = last_item_probability
        self.cut_probability = cut_probability
        if not 0 < mask_probability < 1:
            raise ConfigurationError(f"mask_probability must be in (0, 1), got {mask_probability!r}")
        for name in ("last_item_probability", "cut_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        super().__init__(dropout=dropout, attention_dropout=attention_dropout, **arguments)


class BERT4Rec(ItemSequenceModel):
    """`transformers`' BERT stack; token I is the mask, positions count back from the row's last token (0).

    Counted from the other side, a history one item longer than those trained on would put the mask token where none
    was in training.
    `encode` runs over the history alone; `scores` appends a mask token and reads the item it stands for.
    """

    config_class = BERT4RecConfig
    config: BERT4RecConfig
    recommender_type = "bert4rec"

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__(config, causal=False, extra_tokens=1)  # the mask token, which has a position of its own too
        self.transform = BertPredictionHeadTransform(self.encoder.config)
        self.item_bias = nn.Parameter(torch.zeros(config.num_items))
        self.post_init()

    def _encode_packed(self, item_indices: Tensor, lengths: Tensor) -> Tensor:
        width = item_indices.shape[1]
        positions = lengths[:, None] - 1 - torch.arange(width, device=lengths.device)  # [B, L], below 0 in the padding
        output = self.encoder(
            input_ids=item_indices,
            attention_mask=mask_of_lengths(lengths, width).long(),
            position_ids=positions.clamp(min=0),
        )
        return output.last_hidden_state  # [B, L, C]

    @property
    def output_bias(self) -> Tensor:
        """The items' biases `[I]`."""
        return self.item_bias

    @torch.no_grad()
    def queries(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Return what a mask token appended to the history, which may be empty, stands for [B, C]."""
        packed, lengths = pack_histories(item_indices, self.encoded_mask(item_indices, mask))
        rows = torch.arange(len(packed), device=packed.device)
        tokens = functional.pad(packed, (0, 1))  # [B, L + 1]
        tokens[rows, lengths] = self.num_items
        with evaluation_mode(self):
            return self.transform(self._encode_packed(tokens, lengths + 1)[rows, lengths]).float()

    def training_loss(self, item_indices: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy over the catalog at hidden items, averaged over them.

        Some rows are cut to a random length first; then in each row either its last item alone is hidden, or
        every item with `mask_probability` (one at least).
        """
        cut_lengths = self._choose_lengths(lengths.cpu(), generator)
        width = int(cut_lengths.max())
        hidden = self._choose_hidden(cut_lengths, width, generator).to(item_indices.device)
        item_indices = item_indices[:, :width]
        tokens = item_indices.masked_fill(hidden, self.num_items)
        states = self._encode_packed(tokens, cut_lengths.to(item_indices.device))
        logits = self.transform(states[hidden]) @ self.item_weights.T + self.item_bias
        return functional.cross_entropy(logits, item_indices[hidden])

    def _choose_lengths(self, lengths: Tensor, generator: Generator) -> Tensor:
        """Cut some rows to a length drawn from 2 to their own."""
        draws = torch.rand(2, len(lengths), generator=generator)
        cut = 2 + (draws[0] * (lengths - 1)).long()
        return torch.where(draws[1] < self.config.cut_probability, cut.minimum(lengths), lengths)

    def _choose_hidden(self, lengths: Tensor, width: int, generator: Generator) -> Tensor:
        draws = torch.rand(len(lengths), width, generator=generator)
        draws.masked_fill_(~mask_of_lengths(lengths, width), 2.0)
        cloze = draws < self.config.mask_probability
        cloze |= draws == draws.min(1, keepdim=True).values
        last = torch.zeros_like(cloze)
        last[torch.arange(len(lengths)), lengths - 1] = True
        only_last = torch.rand(len(lengths), 1, generator=generator) < self.config.last_item_probability
        return torch.where(only_last, last, cloze)
