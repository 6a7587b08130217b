"""FDSA-style: one self-attention stack over item ids, one over text features, their states side by side.

After Zhang et al., "Feature-level Deeper Self-Attention Network for Sequential Recommendation", IJCAI 2019; the text
vector is an item's only feature, so that the attention between features falls away. Shapes: `B` rows, `L` packed
history length, `C` width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from .text_vectors import TextVectorConfig, TextVectorModel


class FDSAConfig(TextVectorConfig):
    """Sizes of an `FDSA`, both of its stacks alike; see `TextVectorConfig` for the arguments."""

    model_type = "fdsa"

    # transformers makes a dataclass of every config class that has no __init__ of its own
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class FDSA(TextVectorModel):
    """`h = W [h_id ; h_text]`, the next item scored by its id embedding.

    Built by `from_vectors`. An item never seen in training is scored by an untrained id embedding.

    Args:
        config: Sizes.
    """

    config_class = FDSAConfig
    config: FDSAConfig
    recommender_type = "fdsa"

    def __init__(self, config: FDSAConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.text_size, config.hidden_size)
        self.text_encoder = BertModel(self.encoder.config, add_pooling_layer=False)
        self.text_encoder.set_input_embeddings(None)  # type: ignore[arg-type]
        self.fusion = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.post_init()

    def _encode_packed(self, item_indices: Tensor, lengths: Tensor) -> Tensor:
        features = self.text_projection(self.text_norm(functional.embedding(item_indices, self.text_vectors)))
        text_states = self.text_encoder(inputs_embeds=features).last_hidden_state  # [B, L, C]
        id_states = super()._encode_packed(item_indices, lengths)  # [B, L, C]
        return self.fusion(torch.cat([id_states, text_states], dim=-1))
