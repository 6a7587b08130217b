"""Training of a side network in one call, from purchase histories and a language model."""

import gc
from pathlib import Path
from typing import Any

import torch

from ..base_models import BaseModel, load_base_model
from ..data import Interactions, LeaveOneOut, PromptTemplate
from ..recommenders import FitReport, fit_recommender
from .item_states import ITEM_TEXT, ItemStates, cache_item_states
from .model import SSNA, SSNAConfig

STATES_FOLDER = "states"


def default_ssna_arguments() -> dict[str, Any]:
    """Return the keyword arguments of `fit_recommender` that did best on validation, as a new dict."""
    return {"epochs": 200, "batch_size": 512, "learning_rate": 1e-3, "weight_decay": 0.0, "patience": 10}


def fit_ssna(
    interactions: Interactions,
    base_model: str | Path | BaseModel,
    output_dir: str | Path,
    config: SSNAConfig | None = None,
    *,
    template: PromptTemplate = ITEM_TEXT,
    states_dtype: str = "float32",
    states_batch_size: int = 16,
    states_dir: str | Path | None = None,
    overwrite_states: bool = False,
    progress: bool = False,
    device: torch.device | str | None = None,
    **fit_arguments: Any,
) -> tuple[SSNA, FitReport]:
    """Cache the items' states, let go of the language model, train beside it, save: the two steps of `train_ssna`.

    The states are kept; a second call, or one after a kill, finds what is finished of them. A language model that is
    given loaded stays in memory as long as the caller holds it.

    Args:
        interactions: As `config`, `fit_arguments` and what is returned, see `train_ssna`.
        base_model: The frozen language model, by name or loaded.
        output_dir: Takes the model's files and, beside them, the states.
        config: See there.
        template: How an item is put into words.
        states_dtype: Type of the cached states.
        states_batch_size: Items per forward pass of the language model.
        states_dir: Where the states are kept, for several runs to share; None is `output_dir/states`.
        overwrite_states: Replace states of another origin.
        progress: Show bars.
        device: Where both models run; None is the CPU, or where a loaded language model is.
        fit_arguments: See there.

    Raises:
        ArtifactError: The folder of the states holds some of another origin; else as `train_ssna`.
    """
    config = config or SSNAConfig()
    folder = Path(output_dir)
    base = load_base_model(base_model)
    if device is not None:
        base.model.to(device)  # type: ignore[arg-type]
    states = cache_item_states(
        base,
        interactions.items,
        folder / STATES_FOLDER if states_dir is None else states_dir,
        num_layers=config.num_layers,
        pooling=config.pooling,
        template=template,
        dtype=states_dtype,
        batch_size=states_batch_size,
        overwrite=overwrite_states,
        progress=progress,
    )
    del base, base_model
    gc.collect()  # a model refers to itself in circles
    return train_ssna(interactions, states, folder, config, progress=progress, device=device, **fit_arguments)


def train_ssna(
    interactions: Interactions,
    states: ItemStates,
    output_dir: str | Path,
    config: SSNAConfig | None = None,
    **fit_arguments: Any,
) -> tuple[SSNA, FitReport]:
    """Train the side network on states that are there, without a language model, and save it.

    Args:
        interactions: The users' histories; the last item of each is left for testing, the last but one decides when to
            stop.
        states: Those of the catalog's items, as `cache_item_states` makes them.
        output_dir: Takes the model's files.
        config: Sizes, pooling and seed; None takes the defaults.
        fit_arguments: Changes to `default_ssna_arguments`, as `fit_recommender` takes them, such as `epochs`.

    Returns:
        The trained model in evaluation mode, saved in `output_dir`, and what happened in training.

    Raises:
        ConfigurationError: A setting is out of its range.
        NonFiniteLossError: The loss is NaN or infinite.
    """
    config = config or SSNAConfig()
    split = LeaveOneOut(interactions.histories)
    model = SSNA.from_states(states, config)
    settings = {"seed": config.seed, **default_ssna_arguments(), **fit_arguments}
    report = fit_recommender(model, split.train_sequences, split.samples("valid"), **settings)
    model.save_pretrained(output_dir)
    return model, report
