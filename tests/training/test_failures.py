"""What a run refuses, and how it stops."""

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_bituning import ILoRAConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, ItemCatalog
from peft_bituning.errors import CheckpointError, ConfigurationError, DataError, InputError, NonFiniteLossError
from peft_bituning.recommenders import Precomputed
from peft_bituning.serving import LaserRecommender
from peft_bituning.training import LaserArguments, fit
from peft_bituning.training.checkpoint import CheckpointStore
from peft_bituning.tuners.bituning.encoders import Prefix, StaticPrefix, register_prefix_encoder

Train = Callable[..., LaserRecommender]
STATIC: dict[str, Any] = {"adapter": {"prefix_encoder": "static"}, "known": None, "id_recommender": "none"}


class _Failing(StaticPrefix):
    """A prefix that turns NaN after some passes in training."""

    passes_left = 0

    def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
        prefix = super().forward(batch_size, embeds, mask)
        if self.training:
            type(self).passes_left -= 1
            if type(self).passes_left < 0 and prefix.embeddings is not None:
                return Prefix(prefix.embeddings * float("nan"))
        return prefix


class _Vertical(StaticPrefix):
    """A prefix that is finite, with a gradient that is not."""

    def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
        prefix = super().forward(batch_size, embeds, mask).embeddings
        return Prefix(None if prefix is None else prefix + (prefix * 0).abs().sqrt())


register_prefix_encoder("failing_in_a_test")(_Failing)
register_prefix_encoder("vertical_in_a_test")(_Vertical)
FAILING: dict[str, Any] = {**STATIC, "adapter": {"prefix_encoder": "failing_in_a_test"}}


def _data(histories: list[list[int]], num_items: int) -> Interactions:
    catalog = ItemCatalog.from_records({"item_id": f"i{n}", "title": f"thing {n}"} for n in range(num_items))
    return Interactions(catalog, tuple(f"u{n}" for n in range(len(histories))), tuple(map(tuple, histories)))


# ---------------------------------------------------------------------- a loss that is not finite


def test_loss_turns_nan_and_the_checkpoint_stays(train: Train, tmp_path: Path) -> None:
    _Failing.passes_left = 6  # four updates an epoch
    with pytest.raises(NonFiniteLossError) as caught:
        train(**FAILING, stage1_epochs=3, per_device_train_batch_size=4, save_steps=2)
    message = str(caught.value)
    assert "training stopped at stage 1, epoch 2, update 3: loss nan" in message
    assert "the contrastive loss is not finite though the weights are" in message
    assert "--overwrite_output_dir" in message
    saved = CheckpointStore(tmp_path / "output" / "checkpoints").load_latest()
    assert saved is not None and saved.state["training"]["global_step"] == 6
    assert all(bool(torch.isfinite(value).all()) for value in saved.tensors["adapter"].values())
    _Failing.passes_left = 1000
    train(**FAILING, stage1_epochs=3, per_device_train_batch_size=4, save_steps=2, resume=True)
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert [record["step"] for record in results["log_history"]] == list(range(1, 13))


def test_gradient_turns_nan(train: Train) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"stage 1, epoch 1, update 1: loss \d.*; the loss is finite but its gradient is not"
    ):
        train(**{**STATIC, "adapter": {"prefix_encoder": "vertical_in_a_test"}})


def test_absurd_learning_rate(train: Train, tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"training stopped at stage 1, epoch \d, (after )?update \d.*learning_rate"
    ):
        train(**STATIC, stage1_epochs=2, learning_rate=3e37, warmup_ratio=0.0, per_device_train_batch_size=4)
    assert not (tmp_path / "output" / "results.json").exists()


def test_nan_in_collaborative_embeddings() -> None:
    table = torch.zeros(10, 8)
    table[3, 2] = float("nan")
    with pytest.raises(InputError, match=r"embeddings must be finite, got NaN or infinity in 1 of 10 rows.*\[3\]"):
        Precomputed(table)


# ---------------------------------------------------------------------- data


def test_catalog_of_one_item(train: Train) -> None:
    with pytest.raises(DataError, match="catalog must have at least 2 items to rank, got 1"):
        train(**STATIC, data=_data([[0, 0, 0, 0]], 1))


def test_users_too_short_to_validate(train: Train) -> None:
    with pytest.raises(DataError, match="no user has the three events"):
        train(**STATIC, data=_data([[0, 1], [1]], 3))


def test_users_too_short_to_train(train: Train) -> None:
    with pytest.raises(DataError, match="no user has the four events"):
        train(**STATIC, data=_data([[0, 1, 2], [1, 2, 0]], 3))


def test_short_users_are_counted(train: Train, tmp_path: Path) -> None:
    train(**STATIC, data=_data([[0, 1, 2, 3], [1, 2, 3, 0], [2, 3]], 4))
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["dataset"]["users_not_evaluated"] == 1
    assert results["rows"][-1]["test"]["users"] == 2


def test_items_given_twice_or_not_at_all(train: Train, few: Interactions) -> None:
    with pytest.raises(ConfigurationError, match="items must be None where interactions bring their own catalog"):
        train(**STATIC, items=few.items)
    with pytest.raises(ConfigurationError, match="items must be given with a table of interactions"):
        train(**STATIC, data=[{"user_id": "a", "item_id": "b", "order": 1}])


# ---------------------------------------------------------------------- settings that do not fit


def test_recommender_of_another_catalog(train: Train) -> None:
    with pytest.raises(ConfigurationError, match="must know the catalog's 10 items, got one of 7"):
        train(known=Precomputed(torch.ones(7, 8)))


def test_recommender_of_another_width(train: Train) -> None:
    with pytest.raises(ConfigurationError, match="collaborative_dim must be the recommender's width 8, got 9"):
        train(adapter={"collaborative_dim": 9})


def test_encoder_without_the_recommender_it_reads(train: Train) -> None:
    with pytest.raises(ConfigurationError, match="recommender must not be 'none' for prefix_encoder='mformer'"):
        train(adapter={"collaborative_dim": 8}, known=None, id_recommender="none")


def test_unknown_recommender(train: Train) -> None:
    with pytest.raises(ConfigurationError, match="recommender must be bert4rec, sasrec, none, or the folder"):
        train(known=None, id_recommender="lightgcn")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "poem"}, "template must be one of .*, or a JSON file, got 'poem'"),
        ({"attributes": ["colour"]}, "attributes must be columns of the catalog .* or none, got colour"),
        ({"adapter": {"prefix_encoder": "mormer"}}, "prefix_encoder must be one of .*, got 'mormer'"),
    ],
)
def test_refused_before_a_recommender_is_trained(
    settings: dict[str, Any], message: str, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_module = importlib.import_module("peft_bituning.training.fit")
    monkeypatch.setattr(fit_module, "provide_id_recommender", lambda *_: pytest.fail("trained first"))
    with pytest.raises(ConfigurationError, match=message):
        train(known=None, id_recommender="sasrec", **settings)


def test_nothing_to_train(train: Train) -> None:
    with pytest.raises(ConfigurationError, match="must have something to train, got prefix_encoder='none'"):
        train(adapter={"prefix_encoder": "none", "pooling": "mean"}, known=None, id_recommender="none")


def test_no_room_for_text(train: Train) -> None:
    with pytest.raises(ConfigurationError, match=r"num_virtual_tokens must leave room .* \(512\), got 512"):
        train(**{**STATIC, "adapter": {"prefix_encoder": "static", "num_virtual_tokens": 512}})


def test_base_model_with_an_adapter(
    few: Interactions, tiny_base: Callable[[], BaseModel], tmp_path: Path, train: Train
) -> None:
    used = train(**STATIC).base
    arguments = LaserArguments.paper(str(tmp_path / "second"), id_recommender="none", disable_tqdm=True)
    with pytest.raises(ConfigurationError, match="base_model must be without an adapter, got 'tiny-llama'"):
        fit(few, base_model=used, arguments=arguments)


# ---------------------------------------------------------------------- resuming


@pytest.fixture
def unfinished(train: Train, tmp_path: Path) -> Path:
    """Leave a run that stopped in its second epoch."""
    _Failing.passes_left = 6
    with pytest.raises(NonFiniteLossError):
        train(**FAILING, stage1_epochs=3, per_device_train_batch_size=4, save_steps=2)
    _Failing.passes_left = 1000
    return tmp_path / "output" / "checkpoints"


def test_unfinished_run_is_not_overwritten(unfinished: Path, train: Train) -> None:
    before = sorted(path.name for path in unfinished.iterdir())
    with pytest.raises(ConfigurationError, match="holds an unfinished run; go on with it by --resume, drop it by"):
        train(**FAILING)
    assert sorted(path.name for path in unfinished.iterdir()) == before
    train(**FAILING, overwrite_output_dir=True)
    assert not unfinished.exists()


def test_resume_with_other_settings(unfinished: Path, train: Train, few: Interactions) -> None:
    same: dict[str, Any] = {"stage1_epochs": 3, "per_device_train_batch_size": 4, "resume": True}
    with pytest.raises(
        CheckpointError, match="belongs to another run: arguments.learning_rate was 0.005 and is 0.006;"
    ):
        train(**FAILING, **same, learning_rate=6e-3)
    other = Interactions(few.items, few.user_ids, tuple(tuple(reversed(history)) for history in few.histories))
    with pytest.raises(CheckpointError, match="belongs to another run: data was '"):
        train(**FAILING, **same, data=other)
    with pytest.raises(CheckpointError, match="adapter.num_virtual_tokens was 2 and is 3"):
        train(
            **{**FAILING, "adapter": {"prefix_encoder": "failing_in_a_test", "num_virtual_tokens": 3}},
            **same,
        )
    assert CheckpointStore(unfinished).load_latest() is not None


def test_resume_past_a_damaged_checkpoint(unfinished: Path, train: Train, tmp_path: Path) -> None:
    complete = CheckpointStore(unfinished).complete()
    assert len(complete) == 2
    intact = tmp_path / "copy"
    shutil.copytree(unfinished, intact)
    for file in complete[-1].glob("*.safetensors"):
        content = file.read_bytes()
        file.unlink()  # the older checkpoint may share the file
        file.write_bytes(content[:-8])
    train(**FAILING, stage1_epochs=3, per_device_train_batch_size=4, resume=True)
    fallen_back = json.loads((tmp_path / "output" / "results.json").read_text())
    shutil.copytree(intact, unfinished)
    train(**FAILING, stage1_epochs=3, per_device_train_batch_size=4, resume=True)
    straight = json.loads((tmp_path / "output" / "results.json").read_text())
    assert fallen_back["log_history"] == straight["log_history"]
    assert fallen_back["rows"] == straight["rows"]


def test_resume_of_damaged_checkpoints_only(unfinished: Path, train: Train) -> None:
    for file in unfinished.rglob("state.json"):
        os.truncate(file, 10)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in checkpoints can be used"):
        train(**FAILING, stage1_epochs=3, per_device_train_batch_size=4, resume=True)


def test_resume_with_nothing_to_resume(train: Train, tmp_path: Path) -> None:
    train(**STATIC, resume=True)
    assert (tmp_path / "output" / "results.json").is_file()


def test_recommender_of_other_settings_is_not_taken_over(train: Train, tmp_path: Path) -> None:
    """A run that stopped before its first checkpoint leaves its recommender only."""
    _Failing.passes_left = 0
    with pytest.raises(NonFiniteLossError):
        train(adapter=FAILING["adapter"], known=None, id_recommender="sasrec", id_recommender_epochs=1)
    folder = tmp_path / "output" / "checkpoints" / "recommender"
    assert folder.is_dir() and not CheckpointStore(folder.parent).complete()
    with pytest.raises(CheckpointError, match=re.escape("id_recommender_epochs was 1 and is 2")):
        train(**{**STATIC, "id_recommender": "sasrec"}, id_recommender_epochs=2, resume=True)
    train(**{**STATIC, "id_recommender": "sasrec"}, id_recommender_epochs=1, resume=True)
    names = [row["name"] for row in json.loads((tmp_path / "output" / "results.json").read_text())["rows"]]
    assert "frozen ID recommender (sasrec)" in names


def test_another_methods_config(few: Interactions, tiny_base: Callable[[], BaseModel], tmp_path: Path) -> None:
    arguments = LaserArguments.paper(str(tmp_path / "out"))
    with pytest.raises(ConfigurationError, match="config must be a BiTuningConfig, got ILoRAConfig; examples"):
        fit(few, None, tiny_base(), ILoRAConfig(), arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
