"""The methods beside the language model, as trials of a comparison."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench.methods import METHODS, Trial, frozen_recommenders
from bench.methods.frozen_recommenders import text_vectors
from bench.methods.id_methods import TEXT_WEIGHTS
from bench.rivals.score_sum import ScoreSum
from bench.rivals.text_similarity import TextSimilarity

from peft_bituning.base_models import BaseModel
from peft_bituning.errors import ConfigurationError
from peft_bituning.evaluation import evaluate_ranking, history_scorer
from peft_bituning.recommenders import FitReport, ItemKNN, Popularity, fit_recommender, load_recommender
from peft_bituning.ssna import fit as ssna_fit

SHORT = {"fit": {"epochs": 1}}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("popularity", {}),
        ("item-knn", {"decay": 0.5}),
        ("sasrec", {}),
        ("text-similarity", {}),
        ("item-knn+text", {"text_weight": 2.0}),
        ("zesrec", SHORT),
        ("fdsa", SHORT),
        ("ssna", SHORT),
    ],
)
def test_every_method_ranks_every_test_user(
    method: str, settings: dict[str, Any], make_trial: Callable[..., Trial]
) -> None:
    trial = make_trial(method, settings=settings)
    result = METHODS[method].run(trial)
    ranks = result.report.ranks_unfiltered
    assert ranks.shape == (13,) and (ranks >= 1).all() and (ranks <= 10).all()
    counts = method in ("popularity", "item-knn", "text-similarity", "item-knn+text")
    assert METHODS[method].is_random != counts
    assert (result.trainable_parameters == 0) == counts
    assert (result.valid is None) == (counts and method != "item-knn+text")
    assert result.phases["user"]["seconds"] > 0


def test_counting_sees_the_validation_item(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial("popularity")
    known = [history[:-1] for history in trial.data.histories]
    assert [tuple(sequence) for sequence in trial.split.known_sequences] == known
    for method, model in (("popularity", Popularity(10)), ("item-knn", ItemKNN(10))):
        expected = evaluate_ranking(history_scorer(model.fit(known)), trial.split.samples("test"))
        found = METHODS[method].run(make_trial(method)).report
        np.testing.assert_array_equal(found.ranks_filtered, expected.ranks_filtered)


def test_the_weight_of_the_text_is_chosen_on_validation(make_trial: Callable[..., Trial]) -> None:
    """By what the counts of the training events alone reach there; the test users are ranked by all that is known."""
    trial = make_trial("item-knn+text")
    reached = {
        weight: METHODS[trial.method].run(make_trial(trial.method, settings={"text_weight": weight}))
        for weight in TEXT_WEIGHTS
    }
    ndcg = {weight: result.valid["unfiltered"]["ndcg@10"] for weight, result in reached.items()}
    assert len(set(ndcg.values())) > 1
    chosen = METHODS[trial.method].run(trial)
    best = chosen.details["text_weight"]
    assert ndcg[best] == max(ndcg.values())
    np.testing.assert_array_equal(chosen.report.ranks_unfiltered, reached[best].report.ranks_unfiltered)
    text = TextSimilarity(text_vectors(trial))
    parts = [(1.0, ItemKNN(10).fit(trial.split.train_sequences)), (best, text)]
    valid = evaluate_ranking(history_scorer(ScoreSum(parts)), trial.split.samples("valid")).metrics()
    assert valid == chosen.valid


def test_trials_of_one_seed_share_the_recommender(make_trial: Callable[..., Trial]) -> None:
    first = METHODS["sasrec"].run(make_trial("sasrec"))
    shared = make_trial("sasrec").shared
    (folder,) = shared.glob("sasrec-*[!n]")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    seconds = json.loads(folder.with_suffix(".json").read_text())["seconds"]
    again = METHODS["sasrec"].run(make_trial("sasrec"))
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.phases["training"]["seconds"] == again.phases["training"]["seconds"] == seconds
    np.testing.assert_array_equal(first.report.ranks_unfiltered, again.report.ranks_unfiltered)
    METHODS["sasrec"].run(make_trial("sasrec", seed=1))
    assert len([path for path in shared.iterdir() if path.is_dir()]) == 2
    folder.with_suffix(".json").unlink()  # killed before the seconds were written: trained again, to the same weights
    weights = load_recommender(folder).content_hash()
    METHODS["sasrec"].run(make_trial("sasrec"))
    assert (folder / "model.safetensors").stat().st_mtime_ns != stamp
    assert load_recommender(folder).content_hash() == weights


def test_unknown_settings_are_refused(make_trial: Callable[..., Trial]) -> None:
    with pytest.raises(ConfigurationError, match=r"settings of item-knn must be among neighbors, decay, got k"):
        METHODS["item-knn"].run(make_trial("item-knn", settings={"k": 3}))
    with pytest.raises(ConfigurationError, match=r"settings of popularity must be among \(none\), got k"):
        METHODS["popularity"].run(make_trial("popularity", settings={"k": 3}))


@pytest.mark.parametrize("method", ["zesrec", "fdsa", "ssna"])
def test_the_language_model_is_let_go_of_before_training(
    method: str, make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    trainings: list[int] = []
    trial = make_trial(method, settings=SHORT)

    def load() -> BaseModel:
        base = trial.load_base()
        loaded.append(weakref.ref(base.model))
        return base

    def train(*args: Any, **settings: Any) -> FitReport:
        trainings.append(sum(reference() is not None for reference in loaded))
        return fit_recommender(*args, **settings)

    monkeypatch.setattr(frozen_recommenders, "fit_recommender", train)
    monkeypatch.setattr(ssna_fit, "fit_recommender", train)
    METHODS[method].run(replace(trial, load_base=load))
    assert loaded and trainings == [0]


def test_ssna_is_trained_as_its_own_defaults_say(
    make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch size of encoding is not that of training."""
    seen: list[dict[str, Any]] = []

    def spy(*args: Any, **settings: Any) -> Any:
        seen.append(settings)
        return fit_recommender(*args, **settings)

    monkeypatch.setattr(ssna_fit, "fit_recommender", spy)
    METHODS["ssna"].run(make_trial("ssna", settings={"fit": {"epochs": 2}}))
    (states,) = (make_trial("ssna").shared).glob("states-*/states.safetensors")
    stamp = states.stat().st_mtime_ns
    METHODS["ssna"].run(make_trial("ssna", settings=SHORT, seed=1))  # another seed reads the same states
    assert states.stat().st_mtime_ns == stamp
    expected = {**ssna_fit.default_ssna_arguments(), "epochs": 2, "seed": 0}
    assert {name: seen[0][name] for name in expected} == expected
