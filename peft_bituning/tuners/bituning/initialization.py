"""How an adapter's virtual tokens start: drawn at the scale of the model's own embeddings, or as words."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..rows.backbone import INITIAL_SCALE, device_of, embedding_scale, embeddings_of, token_embeddings, token_width
from .config import BiTuningConfig
from .encoders import PrefixEncoder, build_prefix_encoder


def make_virtual_tokens(model: PreTrainedModel, config: BiTuningConfig) -> tuple[PrefixEncoder, nn.Embedding | None]:
    """Draw an adapter's weights.

    Args:
        model: the language model.
        config: the adapter's settings.

    Returns:
        The prefix encoder, and the suffix [1, D], or None where the pooling has none.

    Raises:
        ConfigurationError: settings that do not fit the model.
    """
    width = token_width(model)
    scale = embedding_scale(model) if config.init_weights else INITIAL_SCALE
    encoder = build_prefix_encoder(config, width, scale)
    if config.pooling != "suffix":
        return encoder, None
    suffix = nn.Embedding(1, width)
    nn.init.normal_(suffix.weight, std=scale)
    return encoder, suffix


def start_from_tokens(
    model: PreTrainedModel, config: BiTuningConfig, encoder: PrefixEncoder, suffix: nn.Embedding | None
) -> None:
    """Put the embeddings of the tokens that the settings name into the prefix and the suffix.

    Args:
        model: the language model.
        config: the adapter's settings.
        encoder: the prefix encoder; on the meta device nothing is put, as the weights come from a file.
        suffix: the suffix, or None.

    Raises:
        ConfigurationError: an id outside the vocabulary, or an encoder that cannot start from tokens.
    """
    nowhere = device_of(token_embeddings(model)).type == "meta"
    if nowhere or any(parameter.is_meta for parameter in encoder.parameters()):
        return
    if config.prefix_token_ids is not None:
        count = encoder.num_tokens
        ids = (config.prefix_token_ids * -(-count // len(config.prefix_token_ids)))[:count]
        encoder.start_from(embeddings_of(model, ids))
    if config.suffix_token_id is not None and suffix is not None:
        with torch.no_grad():
            suffix.weight.copy_(embeddings_of(model, [config.suffix_token_id]))
