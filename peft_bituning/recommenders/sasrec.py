"""SASRec: a causal transformer over the history, the next item scored by its embedding.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018; trained with the full softmax over the catalog
at every position. Shapes: `B` rows, `N` history length, `L` packed length, `C` width, `I` catalog items.
"""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from .base import mask_of_lengths
from .transformer import ItemSequenceConfig, ItemSequenceModel


class SASRecConfig(ItemSequenceConfig):
    """Sizes of a `SASRec`; see `ItemSequenceConfig` for the arguments."""

    model_type = "sasrec"

    # transformers makes a dataclass of every config class that has no __init__ of its own
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class SASRec(ItemSequenceModel):
    """`transformers`' BERT stack with a causal mask; position 0 is the oldest item used."""

    config_class = SASRecConfig
    config: SASRecConfig
    recommender_type = "sasrec"

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config, causal=True, extra_tokens=0)
        self.post_init()

    def _encode_packed(self, item_indices: Tensor, lengths: Tensor) -> Tensor:
        # Padding comes after the real items, so the causal mask alone hides it.
        return self.encoder(input_ids=item_indices).last_hidden_state  # [B, L, C]

    @torch.no_grad()
    def queries(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Return the state of the last item `h_last` [B, C]; that of an empty history is zero."""
        states, encoded = self.read(item_indices, mask)
        last = (encoded.cumsum(1) * encoded).argmax(1)  # [B] column of the last item; 0, a zero state, if there is none
        return states[torch.arange(len(last), device=last.device), last]

    def training_loss(self, item_indices: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy of the next item over the catalog, averaged over all positions."""
        states = self._encode_packed(item_indices[:, :-1], lengths - 1)  # [B, L-1, C]
        is_target = mask_of_lengths(lengths - 1, states.shape[1])
        logits = states[is_target] @ self.item_weights.T  # [M, I]
        return functional.cross_entropy(logits, item_indices[:, 1:][is_target])
