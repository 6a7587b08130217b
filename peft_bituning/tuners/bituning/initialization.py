"""First values of an adapter's virtual tokens: drawn at the scale of the model's own embeddings, or as words."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..rows.backbone import device_of, token_embeddings, token_width
from ..rows.center import EmbeddingCenter
from ..vocabulary import INITIAL_SCALE, embedding_scale, embeddings_of, make_suffix
from .config import BiTuningConfig
from .encoders import PrefixEncoder, build_prefix_encoder


def make_virtual_tokens(
    model: PreTrainedModel, config: BiTuningConfig
) -> tuple[PrefixEncoder, nn.Embedding | None, EmbeddingCenter | None]:
    """Make an adapter's prefix encoder, suffix [1, D] and center, None where the settings have none.

    Raises:
        ConfigurationError: settings that do not fit the model.
    """
    width = token_width(model)
    scale = embedding_scale(model) if config.init_weights else INITIAL_SCALE
    encoder = build_prefix_encoder(config, width, scale)
    suffix = make_suffix(model, scale) if config.pooling == "suffix" else None
    _start_from_tokens(model, config, encoder, suffix)
    return encoder, suffix, EmbeddingCenter(width) if config.center_embeddings else None


def _start_from_tokens(
    model: PreTrainedModel, config: BiTuningConfig, encoder: PrefixEncoder, suffix: nn.Embedding | None
) -> None:
    """Put the embeddings of the tokens that the settings name into the prefix, repeated or cut, and the suffix."""
    nowhere = device_of(token_embeddings(model)).type == "meta"
    if nowhere or any(parameter.is_meta for parameter in encoder.parameters()):
        return  # the weights come from a file
    if config.prefix_token_ids is not None:
        count = encoder.num_tokens
        ids = (config.prefix_token_ids * -(-count // len(config.prefix_token_ids)))[:count]
        encoder.start_from(embeddings_of(model, ids))
    if config.suffix_token_id is not None and suffix is not None:
        with torch.no_grad():
            suffix.weight.copy_(embeddings_of(model, [config.suffix_token_id]))
