"""The forward pass of packed rows: as embeddings, or as ids whose embeddings are replaced on the way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError
from .backbone import find_backbone, is_remote, takes_argument, token_embeddings


def reads_token_ids(model: PreTrainedModel) -> bool:
    """Say whether a model needs token ids beside embeddings.

    So do models with per-layer embeddings, which they look up by id (Gemma3n, Gemma4), and code from outside
    transformers, which may read `input_ids.shape` (ChatGLM2).
    """
    return is_remote(model) or _has_per_layer_embeddings(model)


def placeholder_id(model: PreTrainedModel) -> int:
    """Return the id that stands where a virtual token is: the padding token's, or 0.

    Its embedding is replaced; its per-layer embedding, where the model has one, is used.
    """
    value = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(value) if isinstance(value, int) and 0 <= value < token_embeddings(model).num_embeddings else 0


def generates_from_ids_alone(model: PreTrainedModel) -> bool:
    """Say whether a model's `generate` needs ids or does not pass embeddings on (Bamba, Falcon-H1)."""
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    passed = prepare is None or takes_argument(prepare, "inputs_embeds")
    return reads_token_ids(model) or not passed


@contextmanager
def feed(model: PreTrainedModel, rows: Tensor, ids: Tensor | None, by_ids: bool) -> Iterator[dict[str, Tensor]]:
    """Give the keyword that carries packed rows into a model, while inside.

    Args:
        model: the language model.
        rows: packed rows [B, W, D].
        ids: their token ids [B, W], a placeholder where a virtual token stands; None where the text came as
            embeddings, or the model needs none.
        by_ids: whether the model needs ids, see `reads_token_ids` and `generates_from_ids_alone`.

    Yields:
        `inputs_embeds`; where the model needs ids, `input_ids`, with a hook that puts the rows in place of what the
        embeddings make of them (of each row's copies under beam search, and of the first W columns where a step of
        generation runs without a cache).

    Raises:
        InputError: the model looks up per-layer embeddings and there are no ids.
    """
    if not by_ids:
        yield {"inputs_embeds": rows}
        return
    if ids is None:
        if _has_per_layer_embeddings(model):
            raise InputError(
                f"input_ids must be given to {type(model).__name__}, which looks up per-layer embeddings by id, got "
                "inputs_embeds alone"
            )
        ids = torch.full(rows.shape[:2], placeholder_id(model), device=rows.device)
    width = rows.shape[1]

    def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
        if output.shape[1] < width:
            return None  # a step of cached generation
        copies = rows.repeat_interleave(output.shape[0] // rows.shape[0], dim=0).to(output.dtype)
        return torch.cat([copies, output[:, width:]], dim=1)

    handle = token_embeddings(model).register_forward_hook(replace)
    try:
        yield {"input_ids": ids}
    finally:
        handle.remove()


def run_rows(
    model: PreTrainedModel, rows: Tensor, ids: Tensor | None, mask: Tensor, with_logits: bool, **kwargs: Any
) -> tuple[Any, Tensor, Tensor | None]:
    """Run packed rows [B, W, D], their ids (see `feed`) and mask [B, W] through the headless backbone.

    With `with_logits` they go through the whole model.

    Returns:
        What the model returned, the last hidden states [B, W, D], and the logits [B, W, V] or None.
    """
    count, width = mask.shape
    if is_remote(model) and width == count:  # one more column tells [B, W] from the [W, B] of ChatGLM2
        rows, mask = F.pad(rows, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        ids = None if ids is None else F.pad(ids, (0, 1))
    backbone = find_backbone(model)
    with feed(model, rows, ids, reads_token_ids(model)) as inputs:
        if not with_logits:
            outputs = backbone(attention_mask=mask, return_dict=True, **inputs, **kwargs)
            return outputs, _batch_first(outputs.last_hidden_state, count)[:, :width], None
        states: list[Tensor] = []
        handle = backbone.register_forward_hook(lambda _m, _i, output: states.append(output[0]))
        try:
            outputs = model(attention_mask=mask, return_dict=True, **inputs, **kwargs)
        finally:
            handle.remove()
    return outputs, _batch_first(states[0], count)[:, :width], outputs.logits[:, :width]


def _batch_first(states: Tensor, count: int) -> Tensor:
    return states if len(states) == count else states.transpose(0, 1)


def _has_per_layer_embeddings(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None))
