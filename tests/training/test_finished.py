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
from peft_bituning.errors import CheckpointError
from peft_bituning.recommenders import Precomputed
from peft_bituning.serving import LaserRecommender
from peft_bituning.training import LaserArguments, fit
from peft_bituning.training.results import RESULTS_FILE
from peft_bituning.training.stages import TwoStageTraining

from .conftest import SMALL

Train = Callable[..., LaserRecommender]


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
    with pytest.raises(AssertionError, match="training began"):  # without --resume it is trained anew
        train(prefix_text="a b")
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


def test_other_data_and_parts_are_refused(no_training: LaserRecommender, train: Train, few: Interactions) -> None:
    fewer = replace(few, histories=few.histories[1:], user_ids=few.user_ids[1:])
    with pytest.raises(CheckpointError, match="data was '.*' and is '.*'"):
        train(prefix_text="a b", resume=True, data=fewer)
    with pytest.raises(CheckpointError, match="another one: the frozen recommender is another one"):
        train(prefix_text="a b", resume=True, known=Precomputed(torch.ones(10, 8)))


def test_damaged_results_are_named(no_training: LaserRecommender, train: Train, tmp_path: Path) -> None:
    path = tmp_path / "output" / "results.json"
    for text in (path.read_text()[:-40], "7"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="results.json of the finished run in .* cannot be read"):
            train(prefix_text="a b", resume=True)


def test_another_template_object_is_refused(
    no_training: LaserRecommender, few: Interactions, tiny_base: Any, tmp_path: Path
) -> None:
    settings = {
        name: value
        for name, value in no_training.settings.results["settings"].items()
        if name in LaserArguments.__dataclass_fields__
    }
    arguments = LaserArguments(output_dir=str(tmp_path / "output"), resume=True, disable_tqdm=True, **settings)
    same = PRESETS["no_instruction"]
    found = fit(few, None, tiny_base(), BiTuningConfig(**SMALL), arguments, template=same)
    assert torch.equal(found.table.embeddings, no_training.table.embeddings)
    with pytest.raises(CheckpointError, match="another one: template is another one"):
        fit(few, None, tiny_base(), BiTuningConfig(**SMALL), arguments, template=PRESETS["paper"])


def test_one_of_before_a_field_was_is_loaded(no_training: LaserRecommender, train: Train, tmp_path: Path) -> None:
    """The field's default is what it was trained with."""
    path = tmp_path / "output" / RESULTS_FILE
    results = json.loads(path.read_text())
    del results["adapter"]["center_embeddings"]
    path.write_text(json.dumps(results))
    again = train(prefix_text="a b", resume=True)
    assert torch.equal(again.table.embeddings, no_training.table.embeddings)
    with pytest.raises(CheckpointError, match="adapter.center_embeddings was False and is True"):
        train(prefix_text="a b", resume=True, adapter={"center_embeddings": True})
