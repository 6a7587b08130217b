"""`--resume` on a finished run: nothing is trained again, and another run is not taken for it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_bituning import BiTuningConfig
from peft_bituning.data import PRESETS, Interactions
from peft_bituning.errors import CheckpointError, ConfigurationError
from peft_bituning.recommenders import Precomputed
from peft_bituning.serving import LaserRecommender
from peft_bituning.training import LaserArguments, fit
from peft_bituning.training.stages import TwoStageTraining

Train = Callable[..., LaserRecommender]
SMALL = (
    "num_virtual_tokens",
    "num_experts",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_num_attention_heads",
)


@pytest.fixture
def no_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> LaserRecommender:
    """Finish a run, and let no other one begin."""
    finished = train(prefix_text="a b")

    def refuse(*_: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(TwoStageTraining, "run", refuse)
    return finished


def test_it_is_loaded(no_training: LaserRecommender, train: Train, few: Interactions, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").iterdir() if path.is_file()}
    again = train(prefix_text="a b", resume=True, save_steps=3, disable_tqdm=True)
    assert torch.equal(again.table.embeddings, no_training.table.embeddings)
    assert again.settings.results == no_training.settings.results
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.recommend([few.items.item_ids[:2]], k=3) == no_training.recommend([few.items.item_ids[:2]], k=3)
    with pytest.raises(ConfigurationError, match="holds a finished run; load it by --resume, drop it by --overwrite"):
        train(prefix_text="a b")
    with pytest.raises(AssertionError, match="training began"):
        train(prefix_text="a b", overwrite_output_dir=True)
    assert not (tmp_path / "output" / "results.json").exists()  # it is gone for good
    with pytest.raises(AssertionError, match="training began"):  # where there is none, it begins
        train("elsewhere", prefix_text="a b", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, "settings.learning_rate was 0.005 and is 0.1"),
        ({"adapter": {"num_virtual_tokens": 3}}, "adapter.num_virtual_tokens was 2 and is 3"),
        ({"template": "paper"}, "settings.template was 'no_instruction' and is 'paper'"),
    ],
)
def test_another_one_is_refused(
    changes: dict[str, Any], message: str, no_training: LaserRecommender, train: Train
) -> None:
    with pytest.raises(CheckpointError, match=f"the finished run in .* is another one: {message}; choose another"):
        train(resume=True, **{"prefix_text": "a b", **changes})


def test_other_data_is_refused(no_training: LaserRecommender, train: Train, few: Interactions) -> None:
    fewer = replace(few, histories=few.histories[1:], user_ids=few.user_ids[1:])
    with pytest.raises(CheckpointError, match="data was '.*' and is '.*'"):
        train(prefix_text="a b", resume=True, data=fewer)
    with pytest.raises(CheckpointError, match="another one: parts.id_recommender was '.*' and is '.*'"):
        train(prefix_text="a b", resume=True, known=Precomputed(torch.ones(10, 8)))


def test_damaged_results_are_named(no_training: LaserRecommender, train: Train, tmp_path: Path) -> None:
    path = tmp_path / "output" / "results.json"
    for text in (path.read_text()[:-40], "7"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="results.json of the finished run in .* cannot be read"):
            train(prefix_text="a b", resume=True)


def test_one_of_before_settings_were_renamed_is_loaded(
    no_training: LaserRecommender, train: Train, tmp_path: Path
) -> None:
    path = tmp_path / "output" / "results.json"
    results = json.loads(path.read_text())
    results["settings"]["recommender"] = results["settings"].pop("id_recommender")
    del results["adapter"]["center_embeddings"]
    path.write_text(json.dumps(results))
    assert torch.equal(train(prefix_text="a b", resume=True).table.embeddings, no_training.table.embeddings)
    with pytest.raises(CheckpointError, match="settings.id_recommender was 'bert4rec' and is 'none'"):
        train(prefix_text="a b", resume=True, id_recommender="none")
    with pytest.raises(CheckpointError, match="adapter.center_embeddings was False and is True"):
        train(prefix_text="a b", resume=True, adapter={"center_embeddings": True})


def test_sizes_that_are_not_given_are_those_of_the_model(no_training: LaserRecommender, train: Train) -> None:
    """Not whatever the finished run has."""
    with pytest.raises(CheckpointError, match="adapter.num_virtual_tokens was 2 and is 8"):
        train(prefix_text="a b", resume=True, adapter={"num_virtual_tokens": None})


def test_another_template_object_is_refused(
    no_training: LaserRecommender, few: Interactions, tiny_base: Any, tmp_path: Path
) -> None:
    settings = {
        name: value
        for name, value in no_training.settings.results["settings"].items()
        if name in LaserArguments.__dataclass_fields__
    }
    arguments = LaserArguments(output_dir=str(tmp_path / "output"), resume=True, disable_tqdm=True, **settings)
    adapter = no_training.model.peft_config["default"]
    config = BiTuningConfig(**{name: getattr(adapter, name) for name in SMALL})
    found = fit(few, None, tiny_base(), config, arguments, template=PRESETS["no_instruction"])
    assert torch.equal(found.table.embeddings, no_training.table.embeddings)
    with pytest.raises(CheckpointError, match="another one: parts.template.instruction was"):
        fit(few, None, tiny_base(), config, arguments, template=PRESETS["paper"])
