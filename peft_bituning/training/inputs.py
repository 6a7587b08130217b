"""What training starts from: histories, their split, the adapter and the prompts, checked against each other."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model

from ..base_models import BaseModel
from ..data import (
    PRESETS,
    Interactions,
    ItemCatalog,
    LeaveOneOut,
    PromptEncoder,
    PromptTemplate,
    interactions_from_tables,
)
from ..errors import ConfigurationError, DataError
from ..recommenders import IDRecommender
from ..tuners.bituning import BiTuningConfig, BiTuningModel
from ..tuners.bituning.model import LAYER_NAME
from ..tuners.rows.backbone import max_positions
from .arguments import LaserArguments

logger = logging.getLogger(__name__)


def read_interactions(interactions: Any, items: Any, rejects_path: Path | None) -> Interactions:
    """Bring the data into histories over a catalog.

    Args:
        interactions: `Interactions`, or a table of events.
        items: a table or a catalog; None with `Interactions`.
        rejects_path: where rejected rows of tables go, or None.

    Returns:
        The histories.

    Raises:
        ConfigurationError: items given twice or not at all.
        DataError: tables that cannot be read.
    """
    if isinstance(interactions, Interactions):
        if items is not None:
            raise ConfigurationError("items must be None where interactions bring their own catalog, got both")
        return interactions
    if items is None:
        raise ConfigurationError("items must be given with a table of interactions, got None")
    return interactions_from_tables(interactions, items, rejects_path=rejects_path)


def split_histories(data: Interactions) -> LeaveOneOut:
    """Split by leave-one-out and check that there is something to train and to choose on.

    Args:
        data: the histories.

    Returns:
        The split.

    Raises:
        DataError: a catalog of one item, or histories that are all too short.
    """
    if len(data.items) < 2:
        raise DataError(
            f"the catalog must have at least 2 items to rank, got {len(data.items)}; there is nothing to recommend"
        )
    split = LeaveOneOut(data.histories)
    if not split.samples("valid"):
        raise DataError("no user has the three events that training, validation and test need; give longer histories")
    if not split.training_samples("last_cut"):
        raise DataError(
            "no user has the four events that a training row beside validation and test needs; give longer histories"
        )
    return split


def attach_adapter(
    base: BaseModel, config: BiTuningConfig, recommender: IDRecommender | None, arguments: LaserArguments
) -> PeftModel:
    """Put a fresh adapter on the language model; the same seed gives the same weights.

    Args:
        base: the frozen language model.
        config: the adapter; a `collaborative_dim` of None and token ids of None are filled in, in a copy.
        recommender: the frozen ID recommender, or None.
        arguments: give the seed of the adapter's first weights and the texts that virtual tokens start from.

    Returns:
        The PEFT model.

    Raises:
        ConfigurationError: adapter and recommender do not fit, nothing is left to train, or the language model
            carries an adapter already.
    """
    if hasattr(base.model, LAYER_NAME):
        raise ConfigurationError(
            f"base_model must be without an adapter, got {base.name!r}, which already carries one; load it again, or "
            "give its name or folder"
        )
    config = replace(config)
    if recommender is not None and config.collaborative_dim is None:
        config.collaborative_dim = recommender.embedding_dim
    if recommender is not None and config.collaborative_dim != recommender.embedding_dim:
        raise ConfigurationError(
            f"collaborative_dim must be the recommender's width {recommender.embedding_dim}, "
            f"got {config.collaborative_dim}"
        )
    starts: dict[str, Any] = {}
    if arguments.prefix_text is not None and config.prefix_token_ids is None and config.prefix_encoder != "none":
        starts["prefix_token_ids"] = _token_ids(base, "prefix_text", arguments.prefix_text)
    if arguments.suffix_text is not None and config.suffix_token_id is None and config.pooling == "suffix":
        starts["suffix_token_id"] = _token_ids(base, "suffix_text", arguments.suffix_text)[-1]
    config = replace(config, **starts)
    torch.manual_seed(arguments.seed)
    model = get_peft_model(base.model, config)
    config.base_model_name_or_path, config.revision = base.name, base.revision
    if recommender is None and cast(BiTuningModel, model.base_model).prefix_encoder.needs_collaborative:
        raise ConfigurationError(
            f"recommender must not be 'none' for prefix_encoder={config.prefix_encoder!r}, which reads its embeddings; "
            "name a recommender, or take prefix_encoder='static'"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            f"the adapter must have something to train, got prefix_encoder={config.prefix_encoder!r} with "
            f"pooling={config.pooling!r}; take another prefix encoder, or pooling='suffix'"
        )
    return model


def make_prompts(
    base: BaseModel, model: PeftModel, data: Interactions, template: PromptTemplate, arguments: LaserArguments
) -> PromptEncoder:
    """Set up prompts that fit the model's context.

    Args:
        base: gives the tokenizer and the context.
        model: gives the number of virtual tokens.
        data: gives the catalog.
        template: the prompt.
        arguments: give the limits.

    Returns:
        The prompt encoder.

    Raises:
        ConfigurationError: virtual tokens leave no room for text, or an attribute is not in the catalog.
    """
    num_tokens = cast(BiTuningModel, model.base_model).prefix_encoder.num_tokens
    return make_prompts_beside(num_tokens, base, data, template, arguments)


def make_prompts_beside(
    num_tokens: int, base: BaseModel, data: Interactions, template: PromptTemplate, arguments: LaserArguments
) -> PromptEncoder:
    """Set up prompts that fit the model's context beside virtual tokens and a suffix.

    Args:
        num_tokens: the virtual tokens.
        base: gives the tokenizer and the context.
        data: gives the catalog.
        template: the prompt.
        arguments: give the limits.

    Returns:
        The prompt encoder.

    Raises:
        ConfigurationError: virtual tokens leave no room for text, or an attribute is not in the catalog.
    """
    check_attributes(arguments.attributes or (), data.items)
    length = arguments.max_length
    limit = max_positions(base.model)
    if limit is not None:
        length = min(length, limit - num_tokens - 1)
        if length < 1:
            raise ConfigurationError(
                f"num_virtual_tokens must leave room for text in max_position_embeddings ({limit}), got {num_tokens}"
            )
    return PromptEncoder(template, base.tokenizer, data.items, length, arguments.max_history, arguments.max_item_tokens)


def check_attributes(attributes: Sequence[str], items: ItemCatalog) -> None:
    """Refuse attributes that no item has; a prompt would leave them out without a word.

    Args:
        attributes: what is to be printed beside the title; `none` is nothing.
        items: the catalog.

    Raises:
        ConfigurationError: one of them is no column of the catalog.
    """
    missing = sorted({*attributes} - {*items.text_columns, "none"})
    if missing:
        raise ConfigurationError(
            f"attributes must be columns of the catalog ({', '.join(items.text_columns) or 'it has none'}) or none, "
            f"got {', '.join(missing)}"
        )


def read_template(name: str, attributes: list[str] | None = None) -> PromptTemplate:
    """Return a template by preset or JSON file.

    Args:
        name: a preset's name, or the path of a JSON file.
        attributes: the attributes to print beside the title, `["none"]` for none of them; None leaves the template's.

    Returns:
        The template.

    Raises:
        ConfigurationError: neither.
    """
    if name in PRESETS:
        template = PromptTemplate.from_preset(name)
    elif Path(name).is_file():
        template = PromptTemplate.from_json(Path(name).read_text(encoding="utf-8"))
    else:
        raise ConfigurationError(f"template must be one of {', '.join(PRESETS)}, or a JSON file, got {name!r}")
    if attributes is None:
        return template
    return replace(template, fields=() if attributes == ["none"] else tuple(attributes))


def _token_ids(base: BaseModel, name: str, text: str) -> list[int]:
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigurationError(f"{name} must hold at least one token, got {text!r}")
    return list(ids)
