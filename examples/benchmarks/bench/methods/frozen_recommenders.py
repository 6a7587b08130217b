"""The frozen recommender that a trial's language model reads: over ids, over texts, or counted."""

import gc
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from peft_bituning.artifacts import write_whole
from peft_bituning.base_models import BaseModel
from peft_bituning.errors import ConfigurationError
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.recommenders import (
    FitReport,
    IDRecommender,
    ItemKNN,
    Precomputed,
    default_fit_arguments,
    fit_recommender,
    load_recommender,
)
from peft_bituning.ssna import ItemStates, cache_item_states
from peft_bituning.training.arguments import ID_RECOMMENDERS
from peft_bituning.training.id_recommender import provide_id_recommender

from ..cells import digest
from ..rivals import FDSA, ZESRec
from ..rivals.knn_vectors import knn_item_vectors
from .trial import Trial

COUNTED = "item-knn"
OVER_TEXTS: dict[str, type[FDSA] | type[ZESRec]] = {"zesrec": ZESRec, "fdsa": FDSA}
KINDS = (*ID_RECOMMENDERS, *OVER_TEXTS, COUNTED)
VECTOR_WIDTH = 64  # that of a SASRec's states


def frozen_recommender(
    trial: Trial, kind: str, accelerator: Accelerator, epochs: int | None = None
) -> tuple[IDRecommender, float | None]:
    """Return the recommender of a trial's seed; trials of one seed share one, whichever comes first trains it.

    Args:
        trial: gives data, split, seed and the shared folder.
        kind: `sasrec` or `bert4rec`; `zesrec` or `fdsa`, which start from the language model's states of the items'
            texts; `item-knn`, vectors whose products are its similarities; or the folder of a saved one.
        accelerator: where it is trained.
        epochs: at most; None is `arguments.id_recommender_epochs`.

    Returns:
        The recommender on the CPU, and the seconds it was trained for, None for a saved one.

    Raises:
        ConfigurationError: `none`, or neither a known kind nor a folder.
    """
    if kind == "none":
        raise ConfigurationError(f"id_recommender must name one for {trial.method}, which reads its states, got 'none'")
    if kind not in KINDS:
        if not Path(kind).is_dir():
            raise ConfigurationError(
                f"id_recommender must be {', '.join(KINDS)}, or the folder of a saved one, got {kind!r}"
            )
        return load_recommender(kind), None
    arguments = trial.arguments
    epochs = arguments.id_recommender_epochs if epochs is None else epochs
    origin: list[Any] = [kind, epochs, arguments.seed, trial.data.content_hash]
    if trial.drawn is not None:
        origin.append(trial.drawn)
    if kind in OVER_TEXTS:
        origin += _names(trial.load_base())  # let go of at once: the states are made from one of their own
    folder = trial.shared / f"{kind}-{digest(origin)}"
    seconds_file = folder.with_suffix(".json")
    if not seconds_file.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # trained, but killed before its seconds were written
        started = time.perf_counter()
        if kind in ID_RECOMMENDERS:
            arguments = replace(
                arguments, id_recommender=kind, id_recommender_epochs=epochs, resume=True, overwrite_output_dir=False
            )
            provide_id_recommender(accelerator, arguments, folder, trial.data, trial.split)
        elif kind == COUNTED:
            _from_counts(trial).save_pretrained(folder)
        else:
            fit = {} if epochs is None else {"epochs": epochs}
            fit_over_texts(trial, kind, {}, fit)[0].save_pretrained(folder)
        write_whole(seconds_file, json.dumps({"seconds": time.perf_counter() - started}))
    return load_recommender(folder), float(json.loads(seconds_file.read_text())["seconds"])


def fit_over_texts(
    trial: Trial, kind: str, model: dict[str, Any], fit: dict[str, Any]
) -> tuple[FDSA | ZESRec, FitReport]:
    """Train a sequence model that starts from the language model's states of the items' texts.

    Args:
        trial: gives data, split, language model and seed.
        kind: `zesrec` or `fdsa`.
        model: fields of its config in place of their defaults.
        fit: arguments of `fit_recommender` in place of a SASRec's.
    """
    seed = trial.arguments.seed
    made = OVER_TEXTS[kind].from_vectors(text_vectors(trial), seed=seed, **model)
    report = fit_recommender(
        made,
        trial.split.train_sequences,
        trial.split.samples("valid"),
        seed=seed,
        progress=not trial.arguments.disable_tqdm,
        device=trial.device,
        **{**default_fit_arguments("sasrec"), **fit},
    )
    return made, report


def text_vectors(trial: Trial) -> torch.Tensor:
    """Return the language model's last states of every item's text, averaged over its tokens [I, D]."""
    return text_states(trial, 1, "mean").values[:, -1].float()


def text_states(trial: Trial, num_layers: int, pooling: str) -> ItemStates:
    """Return the language model's states of every item's text, kept on disk for trials of all seeds; it is let go of.

    Args:
        trial: gives the language model, the items and the shared folder.
        num_layers: of how many layers, from the top.
        pooling: `last` or `mean`, over an item's tokens.
    """
    base = trial.load_base()
    base.model.to(trial.device)  # type: ignore[arg-type]
    name = digest([*_names(base), trial.data.content_hash, num_layers, pooling])
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        states = cache_item_states(
            base,
            trial.data.items,
            trial.shared / f"states-{name}",
            num_layers=num_layers,
            pooling=pooling,
            batch_size=trial.arguments.per_device_eval_batch_size,
            overwrite=True,
            progress=not trial.arguments.disable_tqdm,
        )
    del base
    gc.collect()  # a model refers to itself in circles
    return states


def _names(base: BaseModel) -> list[Any]:
    return [base.name, base.fingerprint()]


def _from_counts(trial: Trial) -> IDRecommender:
    # over training events alone: what reads it chooses its epoch on the validation events
    counted = ItemKNN(trial.num_items).fit(trial.split.train_sequences)
    return Precomputed(knn_item_vectors(counted, min(VECTOR_WIDTH, trial.num_items)))
