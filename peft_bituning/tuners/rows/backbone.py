"""The headless part of a language model: what turns token embeddings into hidden states."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ...errors import ContextLengthError, InputError, UnsupportedModelError


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """Find the module that runs the transformer without its language-model head.

    Returns:
        The module that owns the input embeddings and takes `inputs_embeds`, or any arguments where its code is not
        transformers' own.

    Raises:
        UnsupportedModelError: the model is an encoder, an encoder-decoder, or has no such module.
    """
    _refuse_other_kinds(model)
    embeddings = token_embeddings(model)
    for candidate in _candidates(model):
        if candidate is model or not isinstance(candidate, nn.Module):
            continue
        takes = is_remote(model) or takes_argument(candidate.forward, "inputs_embeds")
        if takes and any(module is embeddings for module in candidate.modules()):
            return candidate
    if model.get_output_embeddings() is None and takes_argument(model.forward, "inputs_embeds"):
        return model
    raise UnsupportedModelError(
        f"the base model must have a headless backbone that takes `inputs_embeds` and owns the token embeddings, "
        f"got {type(model).__name__}, where none was found"
    )


def is_remote(model: PreTrainedModel) -> bool:
    """Say whether a model's code comes from outside transformers (`trust_remote_code`)."""
    return not type(model).__module__.startswith("transformers.")


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """Say whether a function names an argument so."""
    return name in inspect.signature(function).parameters


def token_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """Return the `nn.Embedding`, or what has its attributes, that embeds token ids; some models scale inside it."""
    return cast(nn.Embedding, model.get_input_embeddings())


def device_of(embeddings: nn.Module) -> torch.device:
    """Return where embeddings compute: accelerate's hooks bring offloaded weights, kept on `meta`, there.

    It is `meta` where the weights are nowhere.
    """
    weight = cast(Tensor, embeddings.weight)
    hook = getattr(embeddings, "_hf_hook", None)
    if not weight.is_meta or hook is None:
        return weight.device
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def token_width(model: PreTrainedModel) -> int:
    """Return D, the width of the token embeddings (not always the hidden size)."""
    embeddings = token_embeddings(model)
    return int(getattr(embeddings, "embedding_dim", None) or embeddings.weight.shape[-1])


def embed_text(
    model: PreTrainedModel, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return token embeddings [B, T, D] and mask [B, T] of a batch's text, given as ids [B, T] or as embeddings.

    A mask that is None says that all tokens are real.

    Raises:
        InputError: neither or both are given, or their shapes do not fit.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise InputError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise InputError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
        inputs_embeds = token_embeddings(model)(input_ids)
    width = token_width(model)
    tokens = cast(Tensor, inputs_embeds)
    if tokens.ndim != 3 or tokens.shape[2] != width:
        raise InputError(f"inputs_embeds must be [B, T, D] with D = {width}, got {list(tokens.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if attention_mask.shape != tokens.shape[:2]:
        raise InputError(f"attention_mask must be [B, T] = {list(tokens.shape[:2])}, got {list(attention_mask.shape)}")
    return tokens, attention_mask


def check_context(model: PreTrainedModel, num_prefix: int, num_text: int, num_suffix: int) -> None:
    """Check that prefix, text and suffix fit the model's context: `P + T + 1 <= max_position_embeddings`.

    Args:
        model: the language model; one without a stated maximum takes any length.
        num_prefix: P, tokens.
        num_text: text tokens of the longest row.
        num_suffix: 1 with a suffix, else 0.

    Raises:
        ContextLengthError: it says by how many tokens the longest row is too long.
    """
    limit = max_positions(model)
    total = num_prefix + num_text + num_suffix
    if limit is not None and total > limit:
        raise ContextLengthError(
            f"prefix + text + suffix must fit max_position_embeddings ({limit}), got {num_prefix} + {num_text} + "
            f"{num_suffix} = {total}, {total - limit} tokens too many; shorten the text (the newest items stay) or "
            "use fewer virtual tokens"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest row that the model's configuration allows, or None where it names none."""
    config = model.config.get_text_config()
    value = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)  # ChatGLM2
    return int(value) if value else None


def _candidates(model: PreTrainedModel) -> Iterator[object]:
    with suppress(AttributeError, NotImplementedError):
        yield model.get_decoder()
    yield getattr(model, "base_model", None)


def _refuse_other_kinds(model: PreTrainedModel) -> None:
    """Refuse models in which a token sees the tokens after it, a suffix among them, or which encode for a decoder."""
    config, what = getattr(model, "config", None), type(model).__name__
    kind = getattr(config, "model_type", "")
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    pair = getattr(config, "is_encoder_decoder", False)
    if pair or masked or (kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not causal):
        raise UnsupportedModelError(
            "the base model must be a decoder-only (causal) language model, got the "
            f"{'encoder-decoder' if pair else 'encoder'} {what}; load one with AutoModelForCausalLM, such as SmolLM2, "
            "Llama or Qwen"
        )
    if not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(
            f"the base model must be a transformers causal language model, got {what}; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
