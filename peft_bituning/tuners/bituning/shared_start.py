"""What all rows of a batch start with, prefix and instruction, run through the language model once."""

import inspect
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .backbone import find_backbone, token_embeddings
from .forward_pass import reads_token_ids
from .layout import RowLayout

MIN_SAVED = 64  # tokens; a second pass over the layers costs about as much


def why_not(model: PreTrainedModel) -> str | None:
    """Say why a model runs whole rows though they start alike.

    Args:
        model: a transformers model.

    Returns:
        The reason, or None where their start is run once.
    """
    name, backbone = type(model).__name__, find_backbone(model)
    if reads_token_ids(model):
        return f"{name} needs token ids beside embeddings"
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:
        return f"{name} takes no keys and values"
    layers = getattr(_empty_cache(model), "layers", [])
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return f"{name} has layers that are not full attention"
    if model.training and getattr(backbone, "gradient_checkpointing", False):
        return "gradient checkpointing keeps no keys and values"
    embeddings = token_embeddings(model)
    if hasattr(embeddings, "unshard") or hasattr(embeddings.weight, "ds_id"):
        return "the weights are sharded, and every process must make as many passes"
    return None


def run_shared(
    model: PreTrainedModel, layout: RowLayout, rows: Tensor, mask: Tensor, input_ids: Tensor
) -> Tensor | None:
    """Run packed rows in two passes: their common start once, then the rest of each on its keys and values.

    Causal attention makes the states of the start the same whatever follows, so nothing changes but float rounding;
    gradients flow through the keys and values.

    Args:
        model: a transformers model.
        layout: of a batch whose prefix is the same in every row.
        rows: packed rows [B, W, D].
        mask: which of their tokens are real [B, W].
        input_ids: the text [B, T] in the caller's layout.

    Returns:
        The last hidden states [B, W, D]; None where rows have to be run whole: fewer than 64 tokens would be saved,
        it cannot be done (`why_not`), or torch.compile traces the single pass.
    """
    count, width = mask.shape
    if torch.compiler.is_compiling() or (count - 1) * width < MIN_SAVED:
        return None
    if (reason := why_not(model)) is not None:
        return _tell(reason)
    ids = layout.pack_text(input_ids, fill=-1)
    same = (ids == ids[:1]).all(0) & (ids[0] >= 0)  # [T]
    shared = min(layout.num_prefix + int(same.long().cumprod(0).sum()), width - 1)
    if (count - 1) * shared < MIN_SAVED:
        return None
    backbone, past = find_backbone(model), _empty_cache(model)
    settings: dict[str, Any] = {"past_key_values": past, "use_cache": True, "return_dict": True}
    start = backbone(inputs_embeds=rows[:1, :shared], attention_mask=mask[:1, :shared], **settings)
    if past is None or any(past.get_seq_length(layer) != shared for layer in range(len(past.layers))):
        return _tell(f"{type(model).__name__} keeps no keys and values for some layers")
    past.batch_repeat_interleave(count)
    rest = backbone(inputs_embeds=rows[:, shared:], attention_mask=mask, **settings)
    return torch.cat([start.last_hidden_state.expand(count, -1, -1), rest.last_hidden_state], dim=1)


def _empty_cache(model: PreTrainedModel) -> DynamicCache | None:
    try:
        return DynamicCache(config=model.config)
    except (AttributeError, KeyError, TypeError, ValueError):  # a configuration that names no kinds of layers
        return None


@cache
def _tell(reason: str) -> None:
    logging.getLogger(__name__).info("every row computes its own prefix and instruction: %s", reason)
