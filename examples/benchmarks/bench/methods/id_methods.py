"""The methods that tune no language model: counting, sequence models over ids, models over frozen text states."""

from dataclasses import replace
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from peft_bituning.evaluation import RankingReport, evaluate_ranking, history_scorer
from peft_bituning.evaluation.evaluator import HistoryRecommender
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.recommenders import FitReport, ItemKNN, Popularity
from peft_bituning.ssna import SSNA, SSNAConfig, train_ssna

from ..rivals import ScoreSum, TextSimilarity
from .frozen_recommenders import fit_over_texts, frozen_recommender, text_states, text_vectors
from .meter import Meter, time_users
from .trial import Trial, TrialResult, register_method

TEXT_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@register_method("popularity", is_random=False)
@register_method("item-knn", is_random=False)
def run_counting(trial: Trial) -> TrialResult[RankingReport]:
    """Count, over training and validation events as nothing is chosen on validation."""
    kind, names = (Popularity, ()) if trial.method == "popularity" else (ItemKNN, ("neighbors", "decay"))
    settings = trial.only(*names)
    meter = Meter(torch.device("cpu"))
    with meter.phase("training"):
        model = kind(trial.num_items, **settings).fit(trial.split.known_sequences)
    return ranked(trial, meter, model)


@register_method("sasrec", arguments=("id_recommender_epochs",), takes_share=True)
@register_method("bert4rec", arguments=("id_recommender_epochs",), takes_share=True)
def run_sequence_model(trial: Trial) -> TrialResult[RankingReport]:
    """Train the sequence model over ids; the one that trials of this seed may read frozen."""
    settings = trial.only("epochs")
    accelerator = Accelerator()
    meter = Meter(accelerator.device)
    with meter.phase("training"):
        model, seconds = frozen_recommender(trial, trial.method, accelerator, settings.get("epochs"))
    if seconds is not None:
        meter.phases["training"]["seconds"] = seconds
    return ranked(trial, meter, model.to(accelerator.device).eval(), accelerator.device)


@register_method("text-similarity", is_random=False, uses_language_model=True)
def run_text_similarity(trial: Trial) -> TrialResult[RankingReport]:
    """Compare the language model's mean states of the items' texts, without training."""
    settings = trial.only("decay", "centre", "shrinkage")
    meter = Meter(trial.device)
    with meter.phase("training"):
        model = TextSimilarity(text_vectors(trial), **settings)
    return ranked(trial, meter, model)


@register_method("item-knn+text", is_random=False, uses_language_model=True)
def run_item_knn_and_text(trial: Trial) -> TrialResult[RankingReport]:
    """Add item-kNN and text similarity; a `text_weight` that is not given is chosen on validation."""
    settings = trial.only("text_weight", "shrinkage")
    given = settings.get("text_weight")
    meter = Meter(trial.device)
    with meter.phase("training"):
        text = TextSimilarity(text_vectors(trial), shrinkage=settings.get("shrinkage"))
        trained, known = (
            ItemKNN(trial.num_items).fit(events)
            for events in (trial.split.train_sequences, trial.split.known_sequences)
        )
        samples = trial.split.samples("valid")
        reached = {
            weight: evaluate_ranking(history_scorer(_summed(trained, weight, text)), samples).metrics()
            for weight in (TEXT_WEIGHTS if given is None else (float(given),))
        }
        best = max(reached, key=lambda weight: reached[weight]["unfiltered"]["ndcg@10"])
        model = _summed(known, best, text)
    return replace(ranked(trial, meter, model), valid=reached[best], details={"text_weight": best})


@register_method("zesrec", uses_language_model=True, takes_share=True)
@register_method("fdsa", uses_language_model=True, takes_share=True)
def run_text_sequence_model(trial: Trial) -> TrialResult[RankingReport]:
    """Train a sequence model over frozen text vectors."""
    settings = trial.only("fit", "model")
    meter = Meter(trial.device)
    with meter.phase("training"):
        model, report = fit_over_texts(trial, trial.method, settings.get("model", {}), settings.get("fit", {}))
    return ranked(trial, meter, model, trial.device, report)


@register_method("ssna", uses_language_model=True)
def run_ssna(trial: Trial) -> TrialResult[RankingReport]:
    """Train the side network on the language model's cached states."""
    meter = Meter(trial.device)
    with meter.phase("training"):
        model, report = train_ssna_of(trial)
    return ranked(trial, meter, model, trial.device, report)


def train_ssna_of(trial: Trial) -> tuple[SSNA, FitReport]:
    """Train the side network of a trial."""
    settings = trial.only("fit", "model")
    config = SSNAConfig(seed=trial.arguments.seed, **settings.get("model", {}))
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        return train_ssna(
            trial.data,
            text_states(trial, config.num_layers, config.pooling),
            trial.folder / "ssna",
            config,
            device=trial.device,
            progress=not trial.arguments.disable_tqdm,
            **settings.get("fit", {}),
        )


def _summed(counted: ItemKNN, weight: float, text: TextSimilarity) -> HistoryRecommender:
    return cast(HistoryRecommender, ScoreSum([(1.0, counted), (weight, text)]))


def ranked(
    trial: Trial,
    meter: Meter,
    model: HistoryRecommender,
    device: torch.device | str = "cpu",
    report: FitReport | None = None,
) -> TrialResult[RankingReport]:
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
