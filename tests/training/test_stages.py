"""The two stages: which table each epoch trains against, what is kept, what measuring leaves alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from peft_bituning import BiTuningConfig
from peft_bituning.assembly import assemble
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import CheckpointError
from peft_bituning.training import LaserArguments, stages
from peft_bituning.training.checkpoint import Checkpoint, CheckpointStore
from peft_bituning.training.report import Report
from peft_bituning.training.run_folder import RunFolder
from peft_bituning.training.stages import ADAPTER, TwoStageTraining

Make = Callable[..., TwoStageTraining]


@pytest.fixture
def make(tiny_base: Callable[[], BaseModel], few: Interactions, tmp_path: Path) -> Make:
    """Return a maker of trainings of a static prefix: settings of the run by name, `adapter` those of the adapter."""

    def build(adapter: dict[str, Any] | None = None, together: bool | None = None, **changes: Any) -> TwoStageTraining:
        config = BiTuningConfig(prefix_encoder="static", num_virtual_tokens=2, **(adapter or {}))
        encoder = assemble(tiny_base(), config, few.items, template="no_instruction")
        settings = {"stage1_epochs": 2, "stage2_epochs": 2, "cuts": "last_cut", "disable_tqdm": True}
        arguments = LaserArguments(str(tmp_path), learning_rate=1e-2, **{**settings, **changes})
        store = CheckpointStore(tmp_path / "checkpoints")
        split = LeaveOneOut(few.histories)
        return TwoStageTraining(
            Accelerator(cpu=True), encoder, split, len(few.items), arguments, store, {"run": 1}, together
        )

    return build


def let_validation_find(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Give the epochs these NDCGs, one after the other."""
    rank, left = stages.rank_users, list(values)

    class Found:
        def __init__(self, report: Any) -> None:
            self.report = report

        def metrics(self) -> dict[str, Any]:
            metrics = self.report.metrics()
            metrics["unfiltered"]["ndcg@10"] = left.pop(0)
            return metrics

    monkeypatch.setattr(stages, "rank_users", lambda *rest, **named: Found(rank(*rest, **named)))


def test_tables_of_epochs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 encodes anew with what the epoch begins with; stage 2 keeps the best epoch's table and begins with A'."""
    let_validation_find(monkeypatch, [0.3, 0.2, 0.1, 0.4])
    training = make()
    begun = training.model.weights_out()
    stage1, stage2 = training.run()
    assert (stage1.epoch, stage2.epoch) == (1, 2)
    assert stage2.item_side is stage1.item_side and stage1.item_side.epoch == 1
    for name, value in stage1.item_side.weights.items():
        assert torch.equal(value, begun[name])  # A, which encoded the table
    assert any(not torch.equal(value, begun[name]) for name, value in stage1.user_weights.items())
    assert [(record["stage"], record["epoch"]) for record in training.state.epochs] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_patience(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    let_validation_find(monkeypatch, [0.3, 0.2, 0.1, 0.5])
    training = make(stage1_epochs=9, stage2_epochs=1, early_stopping_patience=2)
    stage1, _ = training.run()
    assert stage1.epoch == 1 and [record["stage"] for record in training.state.epochs] == [1, 1, 1, 2]


def test_stages_left_out(make: Make) -> None:
    stage1, stage2 = make(stage2_epochs=0, stage1_epochs=1).run()
    assert stage1 is stage2
    training = make(stage1_epochs=0, stage2_epochs=1)
    begun = training.model.weights_out()
    stage1, stage2 = training.run()
    assert stage1.epoch == 0 and all(torch.equal(value, begun[name]) for name, value in stage1.user_weights.items())
    assert stage2.epoch == 1


def test_a_first_table_is_taken_where_no_center_moves(make: Make) -> None:
    for center in (False, True):
        training = make({"center_embeddings": center}, stage1_epochs=1, stage2_epochs=0)
        table = training._encode_side(1, moves_center=False).table
        stage1, _ = training.run(table)
        assert (stage1.item_side.table is table) == (not center)
        moved = training.model.embedding_center
        assert (moved is not None and float(moved.weight.norm()) > 0) == center


def test_measuring_changes_nothing(make: Make, few: Interactions, tiny_base: Any) -> None:
    training = make({"center_embeddings": True})
    before = training.model.weights_out()
    model: Any = training.model
    report = Report(RunFolder(training.accelerator, training.arguments), training, few, tiny_base(), None)
    table = report.baselines()
    assert all(torch.equal(value, before[name]) for name, value in training.model.weights_out().items())
    assert list(model.peft_config) == [ADAPTER] and table is not None and len(table) == training.num_items
    names = ["popularity", "item-kNN", "text (tf-idf)", "hybrid without the language model"]
    names += ["untrained LLM (mean of text states)", "untrained suffix"]
    assert [row["name"] for row in report.rows] == names


def test_a_users_rows_stand_together_where_the_prefix_is_one(make: Make) -> None:
    assert make().together and not make(together=False).together


def test_validation_is_a_seeded_draw(few: Interactions, tmp_path: Path) -> None:
    split = LeaveOneOut(few.histories)
    drawn = [LaserArguments(seed=seed, max_validation_users=4).validation_samples(split) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 4
    assert LaserArguments().validation_samples(split) == split.samples("valid")


def test_checkpoints_of_another_version_or_run(make: Make, tmp_path: Path) -> None:
    training = make(resume=True)
    training.store.save(0, Checkpoint({"identity": training.identity}, {}))
    with pytest.raises(CheckpointError, match=r"of this version of peft_bituning \(format 2\), got format 1"):
        training.read_checkpoint()
    training.store.save(1, Checkpoint({"format_version": 2, "identity": {**training.identity, "run": 2}}, {}))
    with pytest.raises(CheckpointError, match="belongs to another run: run was 2 and is 1"):
        training.read_checkpoint()
