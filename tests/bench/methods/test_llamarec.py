"""Retrieve and rerank, as a trial of a comparison."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bench.candidates import CandidateTraining
from bench.cells import forget_checkpoints
from bench.methods import METHODS, Trial

from peft_bituning.errors import CheckpointError, ConfigurationError
from peft_bituning.evaluation import evaluate_ranking, history_scorer
from peft_bituning.recommenders import load_recommender

D, LAYERS, INNER = 32, 2, 64
SHORT = {"stage1_epochs": 1, "max_samples_per_epoch": 8, "per_device_train_batch_size": 4}


def test_it_trains_and_goes_on(make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not retrieved keeps the recommender's rank; a stopped trial ends as one that was not stopped."""
    run = METHODS["llamarec"].run

    def make(folder: str, trained_on: str = "retrieved", **changes: Any) -> Trial:
        settings = {"num_candidates": 4, "trained_on": trained_on}
        return make_trial("llamarec", folder, settings, **{**SHORT, **changes})

    trial = make("whole")
    result = run(trial)
    assert result.trained == {"epochs": 2, "updates": 4, "rows": 16, "tokens": result.trained["tokens"]}
    (folder,) = [path for path in trial.shared.iterdir() if path.is_dir()]
    own = evaluate_ranking(history_scorer(load_recommender(folder).eval()), trial.split.samples("test"))
    for found, before in (
        (result.report.ranks_unfiltered, own.ranks_unfiltered),
        (result.report.ranks_filtered, own.ranks_filtered),
    ):
        assert ((found <= 4) == (before <= 4)).all()
        np.testing.assert_array_equal(found[before > 4], before[before > 4])
    retrieved = result.details["candidates"]["test_targets_retrieved"]
    assert retrieved == np.mean(own.ranks_unfiltered <= 4) > 0
    curve = [each["valid"]["unfiltered"]["ndcg@10"] for each in result.details["epochs"]]
    assert result.valid is not None and result.valid["unfiltered"]["ndcg@10"] == max(curve)
    weights = LAYERS * 8 * (4 * 2 * D + 3 * (D + INNER))
    assert (result.trainable_parameters, result.adapter_bytes) == (weights, 4 * weights)
    assert set(result.phases) == {"training", "user"} and result.phases["user"]["seconds"] > 0
    assert result.details["frozen_recommender"]["kind"] == "sasrec"

    save, calls = CandidateTraining._save, 0

    def stop(self: CandidateTraining) -> None:
        nonlocal calls
        save(self)
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CandidateTraining, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(make("stopped"))
    resumed = run(make("stopped", resume=True))
    assert resumed.phases["training"]["resumed"] and not result.phases["training"]["resumed"]
    np.testing.assert_array_equal(resumed.report.ranks_unfiltered, result.report.ranks_unfiltered)
    np.testing.assert_array_equal(resumed.report.ranks_filtered, result.report.ranks_filtered)
    other = make("stopped", "random", resume=True)
    with pytest.raises(CheckpointError, match="candidates.trained_on was 'retrieved' and is 'random'"):
        run(other)
    forget_checkpoints(other.folder)
    assert not (other.folder / "checkpoints").exists()


def test_refusals(make_trial: Callable[..., Trial]) -> None:
    for settings, message in (
        ({"rank": 3}, "settings of lora must be fields of its adapter's config, got rank"),
        ({"num_candidates": 27}, "num_candidates must be at most 26, got 27"),
        ({"trained_on": "all"}, "trained_on must be one of retrieved, random, got 'all'"),
        ({"pooling": "mean"}, "pooling must be 'last' to read the next token, got 'mean'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            METHODS["llamarec"].run(make_trial("llamarec", settings={"num_candidates": 4, **settings}, **SHORT))
    with pytest.raises(ConfigurationError, match="id_recommender must name one for llamarec"):
        METHODS["llamarec"].run(make_trial("llamarec", id_recommender="none"))
