"""The methods that tune no language model: counting, sequence models over ids, models over frozen text states."""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from ..errors import ConfigurationError
from ..evaluation import evaluate_ranking, history_scorer
from ..evaluation.evaluator import HistoryRecommender
from ..matmul import fast_cpu_matmul
from ..recommenders import (
    FitReport,
    IDRecommender,
    ItemKNN,
    Popularity,
    default_fit_arguments,
    fit_recommender,
)
from ..training.arguments import RECOMMENDERS
from ..training.frozen import provide_recommender
from ..training.results import data_hash, write_whole
from .measuring import Meter, time_users
from .trial import Trial, TrialResult, register_method


def frozen_recommender(
    trial: Trial, kind: str, accelerator: Accelerator, epochs: int | None = None
) -> tuple[IDRecommender, float | None]:
    """Return the ID recommender of a trial's seed; trials of one seed share one, whichever comes first trains it.

    Args:
        trial: gives data, split, seed and the shared folder.
        kind: `sasrec`, `bert4rec`, or the folder of a saved one.
        accelerator: where it is trained.
        epochs: at most; None is `arguments.recommender_epochs`.

    Returns:
        The recommender on the CPU, and the seconds it was trained for, None for a saved one.

    Raises:
        ConfigurationError: `none`, or neither a known kind nor a folder.
    """
    if kind == "none":
        raise ConfigurationError(f"recommender must name one for {trial.method}, which reads its states, got 'none'")
    arguments = trial.arguments
    epochs = arguments.recommender_epochs if epochs is None else epochs
    arguments = replace(arguments, recommender=kind, recommender_epochs=epochs, resume=True, overwrite_output_dir=False)
    origin = [kind, epochs, arguments.seed, data_hash(trial.data), *([] if trial.drawn is None else [trial.drawn])]
    folder = trial.shared / f"{kind}-{_digest(origin)}"
    seconds_file = folder.with_suffix(".json")
    if kind in RECOMMENDERS and not seconds_file.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # trained, but killed before its seconds were written
    started = time.perf_counter()
    recommender = provide_recommender(accelerator, arguments, folder, trial.data, trial.split)
    if recommender is None:
        raise ConfigurationError(f"recommender must name one for {trial.method}, got {kind!r}")
    if kind not in RECOMMENDERS:
        return recommender, None
    if not seconds_file.is_file():
        write_whole(seconds_file, json.dumps({"seconds": time.perf_counter() - started}))
    return recommender, float(json.loads(seconds_file.read_text())["seconds"])


def recommender_details(known: IDRecommender, seconds: float | None) -> dict[str, Any]:
    """Describe a frozen recommender beside the costs of a trial that reads it.

    Args:
        known: the recommender.
        seconds: how long it was trained; None for a saved one.
    """
    parameters = sum(value.numel() for value in known.parameters())
    return {"kind": known.recommender_type, "parameters": parameters, "seconds": seconds}


@register_method("popularity", is_random=False)
def run_popularity(trial: Trial) -> TrialResult:
    """Count, over training and validation events as nothing is chosen on validation."""
    trial.only()
    meter = Meter(torch.device("cpu"))
    with meter.phase("training"):
        model = Popularity(trial.num_items).fit(known_sequences(trial))
    return _ranked(trial, meter, model)


@register_method("item-knn", is_random=False)
def run_item_knn(trial: Trial) -> TrialResult:
    """Count who bought what with what, over training and validation events."""
    settings = trial.only("neighbors", "decay")
    meter = Meter(torch.device("cpu"))
    with meter.phase("training"):
        model = ItemKNN(trial.num_items, **settings).fit(known_sequences(trial))
    return _ranked(trial, meter, model)


@register_method("sasrec", arguments=("recommender_epochs",), takes_share=True)
@register_method("bert4rec", arguments=("recommender_epochs",), takes_share=True)
def run_sequence_model(trial: Trial) -> TrialResult:
    """Train the sequence model over ids; the one that trials of this seed may read frozen."""
    settings = trial.only("epochs")
    accelerator = Accelerator()
    meter = Meter(accelerator.device)
    with meter.phase("training"):
        model, seconds = frozen_recommender(trial, trial.method, accelerator, settings.get("epochs"))
    if seconds is not None:
        meter.phases["training"]["seconds"] = seconds
    return _ranked(trial, meter, model.to(accelerator.device).eval(), accelerator.device)


@register_method("text-similarity", is_random=False, uses_language_model=True)
def run_text_similarity(trial: Trial) -> TrialResult:
    """Compare the language model's mean states of the items' texts, without training."""
    from ..recommenders import TextSimilarity

    settings = trial.only("decay", "centre")
    meter = Meter(trial.device)
    with meter.phase("training"):
        model = TextSimilarity(_text_vectors(trial), **settings)
    return _ranked(trial, meter, model)


@register_method("item-knn+text", is_random=False, uses_language_model=True)
def run_item_knn_and_text(trial: Trial) -> TrialResult:
    """Add item-kNN and text similarity, without training."""
    from ..recommenders import ScoreSum, TextSimilarity

    weight = float(trial.only("text_weight").get("text_weight", 4.0))
    meter = Meter(trial.device)
    with meter.phase("training"):
        counted = ItemKNN(trial.num_items).fit(known_sequences(trial))
        model = ScoreSum([(1.0, counted), (weight, TextSimilarity(_text_vectors(trial)))])
    return _ranked(trial, meter, cast(HistoryRecommender, model))


@register_method("zesrec", uses_language_model=True, takes_share=True)
@register_method("fdsa", uses_language_model=True, takes_share=True)
def run_text_sequence_model(trial: Trial) -> TrialResult:
    """Train a sequence model over frozen text vectors."""
    from ..recommenders import FDSA, ZESRec

    settings = trial.only("fit", "model")
    kinds: dict[str, type[FDSA] | type[ZESRec]] = {"zesrec": ZESRec, "fdsa": FDSA}
    kind = kinds[trial.method]
    meter = Meter(trial.device)
    with meter.phase("training"):
        seed = trial.arguments.seed
        model = kind.from_vectors(_text_vectors(trial), seed=seed, **settings.get("model", {}))
        report = fit_recommender(
            model,
            trial.split.train_sequences,
            trial.split.samples("valid"),
            seed=seed,
            progress=not trial.arguments.disable_tqdm,
            device=trial.device,
            **{**default_fit_arguments("sasrec"), **settings.get("fit", {})},
        )
    return _ranked(trial, meter, model, trial.device, report)


@register_method("ssna", uses_language_model=True)
def run_ssna(trial: Trial) -> TrialResult:
    """Train the side network on the language model's cached states."""
    from ..ssna import SSNAConfig, fit_ssna

    settings = trial.only("fit", "model")
    meter = Meter(trial.device)
    with meter.phase("training"), fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        model, report = fit_ssna(
            trial.data,
            trial.load_base(),
            trial.folder / "ssna",
            SSNAConfig(seed=trial.arguments.seed, **settings.get("model", {})),
            batch_size=trial.arguments.per_device_eval_batch_size,
            device=trial.device,
            progress=not trial.arguments.disable_tqdm,
            **settings.get("fit", {}),
        )
    return _ranked(trial, meter, model, trial.device, report)


def known_sequences(trial: Trial) -> list[Sequence[int]]:
    """Return every user's training and validation events, for methods that only count."""
    known = {sample.user: list(sample.history) for sample in trial.split.samples("test")}
    return [known.get(user, sequence) for user, sequence in enumerate(trial.split.train_sequences)]


def _text_vectors(trial: Trial) -> torch.Tensor:
    """Return the language model's last states of every item's text, averaged over its tokens [I, D]."""
    from ..ssna import cache_item_states

    base = trial.load_base()
    name = _digest([base.name, base.fingerprint(), data_hash(trial.data)])
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        states = cache_item_states(
            base,
            trial.data.items,
            trial.shared / f"states-{name}",
            num_layers=1,
            pooling="mean",
            batch_size=trial.arguments.per_device_eval_batch_size,
            overwrite=True,
            progress=not trial.arguments.disable_tqdm,
        )
    return states.values[:, -1].float()


def _ranked(
    trial: Trial,
    meter: Meter,
    model: HistoryRecommender,
    device: torch.device | str = "cpu",
    report: FitReport | None = None,
) -> TrialResult:
    """Rank the test users, count what is trained and kept."""
    samples = trial.split.samples("test")
    scorer = history_scorer(model, device)
    ranked = evaluate_ranking(scorer, samples)
    time_users(meter, lambda sample: evaluate_ranking(scorer, [sample]), samples)
    is_trained = isinstance(model, nn.Module)
    valid = evaluate_ranking(scorer, trial.split.samples("valid")).metrics() if is_trained else None
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    trained = {"epochs": None if report is None else len(report.losses), "updates": None, "rows": None, "tokens": None}
    return TrialResult(
        ranked,
        valid,
        sum(value.numel() for value in parameters if value.requires_grad or is_trained),
        sum(value.numel() * value.element_size() for value in parameters),
        meter.phases,
        trained,
        {} if report is None else {"best_epoch": report.best_epoch},
    )


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
