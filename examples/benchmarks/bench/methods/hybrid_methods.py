"""The hybrid, and what a trained model adds to it: rows `hybrid` and `hybrid+NAME`.

A row takes the settings of its model, `text` (tf-idf, minilm, language-model, none) and `shrinkage`. What the model
reaches alone is in the row's details.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from peft_bituning.catalog.encoder import HistoryEncoder
from peft_bituning.catalog.item_table import ItemTable
from peft_bituning.evaluation import EncodedUsers, RankingReport, evaluate_ranking, history_scorer
from peft_bituning.recommenders import Hybrid, IDRecommender, pad_histories
from peft_bituning.recommenders.hybrid import EmbeddingRecommender
from peft_bituning.recommenders.hybrid.part import SHRINKAGE
from peft_bituning.training.hybrids import read_text

from ..cells import digest
from .frozen_recommenders import frozen_recommender
from .id_methods import ranked, train_ssna_of
from .meter import Meter, time_users
from .trial import METHODS, Trial, TrialResult, register_method
from .tuned_methods import run_tuned
from .tuners import TUNERS

OWN = ("text", "shrinkage")


class SequenceEmbeddings:
    """A sequence model as the hybrid's part `laser`: its scores are products as an adapter's cosines are."""

    def __init__(self, model: IDRecommender) -> None:
        self.model = model
        self.item_embeddings = model.item_weights.detach().float().cpu()

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Return the vectors `[B, C]` that items are scored by."""
        device = self.model.item_weights.device
        item_indices, mask = pad_histories(histories)
        return self.model.queries(item_indices.to(device), mask.to(device)).cpu()


@register_method("hybrid", uses_language_model=True, arguments=("id_recommender_epochs",))
def run_hybrid(trial: Trial) -> TrialResult[RankingReport]:
    """Fit the hybrid without a language model, over the SASRec that trials of this seed share."""
    trial.only(*OWN)
    return _fitted(trial, None, None)


def _run_with_tuned(trial: Trial) -> TrialResult[RankingReport]:
    """Train a language model by another method, encode users once, and fit the hybrid with it."""
    inner = _inner(trial)
    kept: list[EncodedUsers] = []

    def keep(encoder: HistoryEncoder, table: ItemTable) -> EncodedUsers:
        users = EncodedUsers(table)
        histories = [sample.history for sample in trial.arguments.validation_samples(trial.split)]
        users.keep(histories, encoder.encode(histories, description="validation users"))
        kept.append(users)
        return users

    alone = run_tuned(inner, keep)
    return _fitted(trial, kept[0], alone)


def _run_with_ssna(trial: Trial) -> TrialResult[RankingReport]:
    """Train the side network, and fit the hybrid with it."""
    inner, meter = _inner(trial), Meter(trial.device)
    with meter.phase("training"):
        model, report = train_ssna_of(inner)
    alone = ranked(inner, meter, model, trial.device, report)
    return _fitted(trial, SequenceEmbeddings(model.eval()), alone)


def _inner(trial: Trial) -> Trial:
    """Return the trial of the model alone, in a folder that rows share which differ in the hybrid alone."""
    settings = {name: value for name, value in trial.settings.items() if name not in OWN}
    method = trial.method.removeprefix("hybrid+")
    name = digest([method, settings, trial.arguments.trajectory(), trial.data.content_hash])
    arguments = replace(trial.arguments, output_dir=str(trial.shared / f"{method}-{name}"))
    return replace(trial, method=method, settings=settings, arguments=arguments)


def _fitted(
    trial: Trial, laser: EmbeddingRecommender | None, alone: TrialResult[RankingReport] | None
) -> TrialResult[RankingReport]:
    """Fit on the validation users, rank the test users, and measure the seconds of a user."""
    meter = Meter(torch.device("cpu"))
    text = trial.settings.get("text", "tf-idf")
    with meter.phase("training"):
        known, _ = frozen_recommender(trial, "sasrec", Accelerator())
        base = trial.load_base() if str(text).startswith("language-model") else None
        vectors = read_text(None if text == "none" else text, trial.data, base, trial.shared)
        hybrid = Hybrid.fit(
            trial.split,
            trial.data.items,
            known.cpu().eval(),
            laser,
            vectors,
            shrinkage=trial.settings.get("shrinkage", SHRINKAGE),
            seed=trial.arguments.seed,
            samples=trial.arguments.validation_samples(trial.split),
        )
    samples = trial.split.samples("test")
    scorer = history_scorer(hybrid)
    report = evaluate_ranking(scorer, samples)
    time_users(meter, lambda sample: evaluate_ranking(scorer, [sample]), samples)
    details: dict[str, Any] = {"weights": hybrid.weights}
    if alone is None:
        nothing = {"epochs": None, "updates": None, "rows": None, "tokens": None}
        return TrialResult(report, None, 0, 0, meter.phases, nothing, details)
    details |= {"alone": alone.report.metrics(), **alone.details}
    phases = {**alone.phases, "fitting": meter.phases["training"]}
    return replace(alone, report=report, valid=None, phases=phases, details=details, weights=None)


for _name in TUNERS:
    METHODS[f"hybrid+{_name}"] = replace(
        METHODS[_name],
        run=_run_with_tuned,
        arguments=tuple(sorted({*METHODS[_name].arguments, "id_recommender_epochs"})),
        takes_share=False,
        takes_start=False,
    )
METHODS["hybrid+ssna"] = replace(METHODS["ssna"], run=_run_with_ssna, arguments=("id_recommender_epochs",))
