"""The vocabulary: its embeddings' scale, those of single tokens, the id that ends a text, a suffix drawn alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from .rows.backbone import device_of, token_embeddings, token_width

INITIAL_SCALE = 0.02


def embedding_scale(model: PreTrainedModel) -> float:
    """Measure the standard deviation of the embedding module's output over a sample of the vocabulary.

    It is 0.02 where the weights are not in memory (meta device).
    """
    embeddings = token_embeddings(model)
    device = device_of(embeddings)
    if device.type == "meta":
        return INITIAL_SCALE
    sample = torch.arange(0, embeddings.num_embeddings, max(1, embeddings.num_embeddings // 512), device=device)
    with torch.no_grad(), _whole(embeddings):
        scale = float(embeddings.forward(sample).float().std())
    return scale if scale > 0 else INITIAL_SCALE


def embeddings_of(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Look up the embeddings [M, D] of M vocabulary ids as the model's first layer sees them, without gradient.

    Raises:
        ConfigurationError: an id outside the vocabulary.
    """
    embeddings = token_embeddings(model)
    outside = [token for token in token_ids if token >= embeddings.num_embeddings]
    if outside:
        raise ConfigurationError(
            f"prefix_token_ids and suffix_token_id must be below the vocabulary's {embeddings.num_embeddings}, "
            f"got {outside[0]}; take them from this model's own tokenizer"
        )
    with torch.no_grad(), _whole(embeddings):
        return embeddings.forward(torch.tensor(token_ids, device=device_of(embeddings)))


def eos_token_id(model: PreTrainedModel) -> int | None:
    """Return the id of the end-of-sequence token that the model's configuration names, or None."""
    value = getattr(model.config.get_text_config(), "eos_token_id", None)
    return value[0] if isinstance(value, list | tuple) else value


def make_suffix(model: PreTrainedModel, scale: float) -> nn.Embedding:
    """Draw a suffix [1, D] of this standard deviation."""
    suffix = nn.Embedding(1, token_width(model))
    nn.init.normal_(suffix.weight, std=scale)
    return suffix


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Put a module's weights together where ZeRO-3 or FSDP2 keeps them in pieces; call its `forward`, not its hooks."""
    in_pieces: Any = module if hasattr(module, "unshard") else None
    with gather_params_ctx(module.parameters(), modifier_rank=None):
        if in_pieces is not None:
            in_pieces.unshard()
        try:
            yield
        finally:
            if in_pieces is not None:
                in_pieces.reshard()
