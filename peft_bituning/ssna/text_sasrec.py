"""SASRec over item embeddings that are computed from text features instead of being looked up by id.

Shapes: `B` rows, `L` packed history length, `C` width, `I` catalog items, `M` training positions.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional

from ..recommenders.base import evaluation_mode
from ..recommenders.sasrec import SASRec, SASRecConfig
from ..recommenders.transformer import mask_of_lengths


class TextSASRec(SASRec):
    """A causal transformer over items known by their text; there is no weight for any single item.

    A subclass gives `embed_items`. An item that was never seen in training has text, hence an embedding.
    """

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        self.encoder.set_input_embeddings(None)  # type: ignore[arg-type]

    def embed_items(self) -> Tensor:
        """Compute the embeddings `[I, C]` of the whole catalog, with gradients where they are enabled."""
        raise NotImplementedError

    @property
    def item_weights(self) -> Tensor:
        """Item embeddings `[I, C]`, input and output alike: frozen, without dropout."""
        with torch.no_grad(), evaluation_mode(self):
            return self.embed_items().detach()

    def _encode_packed(self, item_indices: Tensor, lengths: Tensor) -> Tensor:
        return self._causal_states(item_indices, self.item_weights)

    def _causal_states(self, item_indices: Tensor, item_embeddings: Tensor) -> Tensor:
        """Run histories [B, L] over embeddings [I, C] -> [B, L, C]."""
        inputs = functional.embedding(item_indices, item_embeddings)
        return self.encoder(inputs_embeds=inputs).last_hidden_state

    def training_loss(self, item_indices: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy of the next item over the catalog, averaged over all positions.

        The catalog's embeddings are computed once and have gradients as inputs and as targets. Rows [B, L] begin in
        column 0 and have 2 real items or more; the generator is not used, as every position is a target.
        """
        embeddings = self.embed_items()  # [I, C]
        states = self._causal_states(item_indices[:, :-1], embeddings)  # [B, L-1, C]
        is_target = mask_of_lengths(lengths - 1, states.shape[1])
        logits = states[is_target] @ embeddings.T  # [M, I]
        return functional.cross_entropy(logits, item_indices[:, 1:][is_target])
