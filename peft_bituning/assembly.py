"""The assembly: a language model with an adapter, prompts, a frozen ID recommender, and the encoder that joins them."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedTokenizerBase

from .base_models import BaseModel, load_base_model
from .catalog.encoder import HistoryEncoder, HistorySettings
from .data import PRESETS, ItemCatalog, PromptEncoder, PromptTemplate
from .data.collator import HistoryCollator
from .errors import ConfigurationError
from .recommenders import IDRecommender
from .tuners.bituning import BiTuningConfig
from .tuners.bituning.encoders import prefix_encoder_class
from .tuners.rows.backbone import max_positions
from .tuners.rows.embedding_model import EmbeddingModel


def assemble(
    base_model: str | Path | BaseModel,
    adapter: PeftConfig | EmbeddingModel,
    items: ItemCatalog,
    id_recommender: IDRecommender | None = None,
    template: PromptTemplate | str = "paper",
    settings: HistorySettings | None = None,
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> HistoryEncoder:
    """Put together what encodes users and items.

    `encoder = assemble("smollm2-135m", BiTuningConfig(prefix_encoder="static"), catalog)`; then `encoder.model` is what
    an optimizer trains, `encoder.forward(histories)` one batch with gradients, `encoder.encode_items(len(catalog))` the
    item table, and `encoder.collator.prompts` the texts.

    Args:
        base_model: the language model: Hub id, folder, alias, or loaded.
        adapter: settings of a fresh adapter, as `attach_adapter` takes them, or a model that is there: a `PeftModel`
            with a Bi-Tuning or iLoRA adapter, or another embedding model around `base_model`.
        items: the catalog of I items.
        id_recommender: the frozen ID recommender over the same catalog; None where the prefix reads none.
        template: the prompt, or a preset's name.
        settings: how much of a history is read; None is the defaults.
        batch_size: rows per forward pass of `encode`.
        device: where the model runs; None leaves it where it is.

    Returns:
        The encoder.

    Raises:
        ConfigurationError: the parts do not fit each other, or virtual tokens leave no room for text.
    """
    base = load_base_model(base_model)
    settings = settings or HistorySettings()
    model = adapter if not isinstance(adapter, PeftConfig) else attach_adapter(base, adapter, id_recommender)
    device = next(model.parameters()).device if device is None else torch.device(device)
    template = PromptTemplate.from_preset(template) if isinstance(template, str) else template
    length, limit = settings.max_length, max_positions(base.model)
    if limit is not None:
        length = min(length, limit - model.num_virtual_tokens - 1)
        if length < 1:
            raise ConfigurationError(
                f"num_virtual_tokens must leave room for text in max_position_embeddings ({limit}), got "
                f"{model.num_virtual_tokens}"
            )
    prompts = PromptEncoder(template, base.tokenizer, items, length, settings.max_history, settings.max_item_tokens)
    read = id_recommender if model.needs_collaborative else None
    newest = settings.max_collaborative_items or (1 if id_recommender is None else id_recommender.max_length)
    collator = HistoryCollator(prompts, pad_token_id(base.tokenizer), newest)
    if read is not None:
        read = read.to(device).eval()
    return HistoryEncoder(model.to(device), collator, read, device, settings, batch_size)


def attach_adapter(
    base: BaseModel,
    config: PeftConfig,
    id_recommender: IDRecommender | None = None,
    seed: int = 0,
    prefix_text: str | None = None,
    suffix_text: str | None = None,
) -> EmbeddingModel:
    """Put a fresh adapter on the language model; the same seed gives the same weights.

    Args:
        base: the frozen language model.
        config: a Bi-Tuning or iLoRA adapter; a `collaborative_dim` of None and token ids of None are filled in, in a
            copy.
        id_recommender: the frozen ID recommender, or None.
        seed: of the adapter's first weights.
        prefix_text: text whose embeddings the prefix starts from, where there is one and the config names none.
        suffix_text: text whose last token the suffix starts from, likewise.

    Returns:
        The `PeftModel`.

    Raises:
        ConfigurationError: adapter and recommender do not fit, nothing is left to train, or the language model
            carries an adapter already.
    """
    refuse_adapter(base)
    config = replace(config)
    reads = not isinstance(config, BiTuningConfig) or prefix_encoder_class(config.prefix_encoder).needs_collaborative
    if id_recommender is None and reads:
        raise ConfigurationError(
            f"id_recommender must not be 'none' for {_reader(config)}, which reads its embeddings; name one, or take "
            "prefix_encoder='static'"
        )
    width: int | None = getattr(config, "collaborative_dim", None)
    if id_recommender is not None and width is None:
        width = config.collaborative_dim = id_recommender.embedding_dim  # type: ignore[attr-defined]
    if id_recommender is not None and width != id_recommender.embedding_dim:
        raise ConfigurationError(
            f"collaborative_dim must be the recommender's width {id_recommender.embedding_dim}, got {width}"
        )
    if isinstance(config, BiTuningConfig):
        config = replace(config, **_first_tokens(base, config, prefix_text, suffix_text))
    torch.manual_seed(seed)
    model = get_peft_model(base.model, config)
    config.base_model_name_or_path, config.revision = base.name, base.revision
    found = cast(EmbeddingModel, model)  # a PeftModel passes on what its tuner offers
    if not any(parameter.requires_grad for parameter in found.parameters()):
        raise ConfigurationError(
            f"the adapter must have something to train, got {_reader(config)} with "
            f"pooling={getattr(config, 'pooling', None)!r}; take another prefix encoder, or pooling='suffix'"
        )
    return found


def refuse_adapter(base: BaseModel) -> None:
    """Refuse a language model that carries an adapter already: a second one would overwrite it.

    Args:
        base: the language model.

    Raises:
        ConfigurationError: it has one.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.model.modules()):
        raise ConfigurationError(
            f"base_model must be without an adapter, got {base.name!r}, which already carries one; load it again, or "
            "give its name or folder"
        )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token id to fill padding with; its value is inert."""
    return next((int(value) for value in (tokenizer.pad_token_id, tokenizer.eos_token_id) if value is not None), 0)


def read_template(name: str, attributes: list[str] | None = None, items: ItemCatalog | None = None) -> PromptTemplate:
    """Return a template by preset or JSON file.

    Args:
        name: a preset's name, or the path of a JSON file.
        attributes: the attributes to print beside the title, `["none"]` for none of them; None and `["template"]` leave
            the template's own choice.
        items: the catalog, which the attributes must be columns of: a prompt would leave them out without a word.

    Returns:
        The template.

    Raises:
        ConfigurationError: neither a preset nor a file, or an attribute that no item has.
    """
    if name in PRESETS:
        template = PromptTemplate.from_preset(name)
    elif Path(name).is_file():
        template = PromptTemplate.from_json(Path(name).read_text(encoding="utf-8"))
    else:
        raise ConfigurationError(f"template must be one of {', '.join(PRESETS)}, or a JSON file, got {name!r}")
    if attributes in (None, ["template"]):
        return template
    attributes = attributes or []
    missing = [] if items is None else sorted({*attributes} - {*items.text_columns, "none"})
    if missing and items is not None:
        raise ConfigurationError(
            f"attributes must be columns of the catalog ({', '.join(items.text_columns) or 'it has none'}) or none, "
            f"got {', '.join(missing)}"
        )
    return replace(template, fields=() if attributes == ["none"] else tuple(attributes))


def _reader(config: PeftConfig) -> str:
    name = getattr(config, "prefix_encoder", None)
    return type(config).__name__ if name is None else f"prefix_encoder={name!r}"


def _first_tokens(
    base: BaseModel, config: BiTuningConfig, prefix_text: str | None, suffix_text: str | None
) -> dict[str, Any]:
    """Name the tokens that prefix and suffix start from."""
    starts: dict[str, Any] = {}
    if prefix_text is not None and config.prefix_token_ids is None and config.prefix_encoder != "none":
        starts["prefix_token_ids"] = _token_ids(base, "prefix_text", prefix_text)
    if suffix_text is not None and config.suffix_token_id is None and config.pooling == "suffix":
        starts["suffix_token_id"] = _token_ids(base, "suffix_text", suffix_text)[-1]
    return starts


def _token_ids(base: BaseModel, name: str, text: str) -> list[int]:
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigurationError(f"{name} must hold at least one token, got {text!r}")
    return list(ids)
