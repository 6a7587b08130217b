"""The example that adds scores: the weight is validation's choice, and the arithmetic is numpy's."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peft_bituning import LaserRecommender
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import ItemKNN, pad_histories

SCRIPT = Path(__file__).parents[2] / "examples" / "by_feature" / "fuse_scores.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuse_scores", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flags(trained: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(script, "load_interactions", lambda name: trained.data)
    places = ["--model", str(trained.folder), "--base_model", str(trained.base_folder)]
    return [*places, "--dataset", "made-up", "--disable_tqdm"]


def test_the_sum_by_hand(
    script: ModuleType, flags: list[str], trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fused.json"
    script.main([*flags, "--with", "item-knn", "recommender", "--output", str(output)])
    rows = json.loads(output.read_text())
    label = next(name for name in rows if name.startswith("laser + ") and name.endswith("item-knn"))
    weights = {float(weight): value for weight, value in rows[label]["validation_ndcg@10"].items()}
    assert rows[label]["weight"] == max(weights, key=lambda weight: weights[weight])

    data: Interactions = trained.data
    split = LeaveOneOut(data.histories)
    samples = split.samples("valid")
    recommender = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder)
    users = recommender.encoder.encode([sample.history for sample in samples]).numpy()
    table = recommender.table.embeddings.numpy()
    laser = users / np.linalg.norm(users, axis=1, keepdims=True) @ table.T
    knn = ItemKNN(len(data.items)).fit(split.train_sequences)
    other = knn.scores(*pad_histories([sample.history for sample in samples])).numpy()
    scores = laser / laser.std(axis=1, ddof=1).mean() + 0.7 * other / other.std(axis=1, ddof=1).mean()
    target = np.array([sample.target for sample in samples])
    own = scores[np.arange(len(target)), target][:, None]
    ranks = (scores > own + 1e-6).sum(1) + 1 + ((np.abs(scores - own) <= 1e-6).sum(1) - 1) / 2
    assert weights[0.7] == pytest.approx(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean(), abs=1e-6)
    text = capsys.readouterr().out
    assert f"| {label} | {rows[label]['unfiltered']['recall@10']:.4f} ± " in text
    assert {name.split(" x ")[-1] for name in rows} == {"laser", "item-knn", "recommender"}


def test_refusals(script: ModuleType, flags: list[str], trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(items=SimpleNamespace(item_ids=["another"]))
    monkeypatch.setattr(script, "load_interactions", lambda name: other)
    with pytest.raises(ConfigurationError, match="--dataset must be what .* was trained on, got another catalog"):
        script.main(flags)
    with pytest.raises(SystemExit):
        script.main([*flags, "--with", "luck"])
    recommender = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder)
    recommender.id_recommender = None
    with pytest.raises(ConfigurationError, match="--with must not be recommender here"):
        script.other_scorer("recommender", recommender, [])


def test_equal_scores_have_no_spread_to_divide_by(script: ModuleType) -> None:
    assert script.spread_of(lambda batch: torch.zeros(len(batch), 4), [None] * 3) == 1e-12
