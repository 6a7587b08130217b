"""Rows of hybrids: without a model, and with a tuned one and the side network as the part `laser`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from bench.methods import METHODS, Trial
from bench.methods.frozen_recommenders import frozen_recommender

from peft_bituning.errors import ConfigurationError
from peft_bituning.evaluation import evaluate_ranking, history_scorer
from peft_bituning.recommenders import Hybrid


def test_the_hybrid_alone(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial("hybrid")
    result = METHODS["hybrid"].run(trial)
    known, _ = frozen_recommender(trial, "sasrec", Accelerator())
    hybrid = Hybrid.fit(trial.split, trial.data.items, known, samples=trial.arguments.validation_samples(trial.split))
    expected = evaluate_ranking(history_scorer(hybrid), trial.split.samples("test"))
    assert np.array_equal(result.report.ranks_unfiltered, expected.ranks_unfiltered)
    assert result.details["weights"] == hybrid.weights and result.adapter_bytes == 0


def test_other_texts(make_trial: Callable[..., Trial]) -> None:
    weights = [
        METHODS["hybrid"].run(replace(make_trial("hybrid"), settings={"text": text})).details["weights"]
        for text in ("none", "language-model:1")
    ]
    assert not any("text" in name for name in weights[0]) and weights[0] != weights[1]
    with pytest.raises(ConfigurationError, match="settings of hybrid must be among text, shrinkage, got knob"):
        METHODS["hybrid"].run(replace(make_trial("hybrid"), settings={"knob": 1}))


@pytest.mark.parametrize(
    ("name", "settings"), [("bituning-static", {"num_virtual_tokens": 2}), ("ssna", {"fit": {"epochs": 2}})]
)
def test_a_model_beside_it(make_trial: Callable[..., Trial], name: str, settings: dict[str, Any]) -> None:
    trial = replace(make_trial(f"hybrid+{name}"), settings=settings)
    result = METHODS[f"hybrid+{name}"].run(trial)
    alone = METHODS[name].run(replace(make_trial(name), settings=settings))
    assert result.details["alone"] == alone.report.metrics()
    assert result.trainable_parameters == alone.trainable_parameters > 0
    assert len(result.report.ranks_unfiltered) == len(alone.report.ranks_unfiltered)
    again = METHODS[f"hybrid+{name}"].run(replace(trial, settings={**settings, "text": "none"}))
    assert again.details["alone"] == alone.report.metrics()  # trained once
