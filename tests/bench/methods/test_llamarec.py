"""Retrieve and rerank, as a trial of a comparison."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.candidates import CandidateTraining
from bench.cells import forget_checkpoints
from bench.methods import METHODS, Trial

from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import CheckpointError, ConfigurationError
from peft_bituning.evaluation import evaluate_ranking, history_scorer
from peft_bituning.recommenders import load_recommender
from peft_bituning.training import LaserArguments

D, LAYERS, INNER = 32, 2, 64


@pytest.fixture
def make_trial(few: Interactions, tiny_base: Callable[[], BaseModel], tmp_path: Path) -> Callable[..., Trial]:
    """Return a maker of trials over few users; all share a folder."""

    def make(folder: str = "llamarec", settings: Any = None, **changes: Any) -> Trial:
        arguments: dict[str, Any] = {
            "stage1_epochs": 1,
            "stage2_epochs": 1,
            "max_samples_per_epoch": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "recommender": "sasrec",
            "recommender_epochs": 2,
            "disable_tqdm": True,
            "save_steps": 1,
        }
        return Trial(
            "llamarec",
            {"num_candidates": 4, **(settings or {})},
            few,
            LeaveOneOut(few.histories),
            tiny_base,
            LaserArguments(output_dir=str(tmp_path / folder), **{**arguments, **changes}),
            tmp_path / "shared",
            torch.device("cpu"),
        )

    return make


def test_it_trains_and_goes_on(make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not retrieved keeps the recommender's rank; a stopped trial ends as one that was not stopped."""
    run, trial = METHODS["llamarec"].run, make_trial("whole")
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
            run(make_trial("stopped"))
    resumed = run(make_trial("stopped", resume=True))
    assert resumed.phases["training"]["resumed"] and not result.phases["training"]["resumed"]
    np.testing.assert_array_equal(resumed.report.ranks_unfiltered, result.report.ranks_unfiltered)
    np.testing.assert_array_equal(resumed.report.ranks_filtered, result.report.ranks_filtered)
    other = make_trial("stopped", {"trained_on": "random"}, resume=True)
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
            METHODS["llamarec"].run(make_trial(settings=settings))
    with pytest.raises(ConfigurationError, match="recommender must name one for llamarec"):
        METHODS["llamarec"].run(make_trial(recommender="none"))
