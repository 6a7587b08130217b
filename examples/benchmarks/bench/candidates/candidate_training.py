"""Epochs of training on candidates: one loop for letters and for titles."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from peft_bituning.errors import CheckpointError
from peft_bituning.training.arguments import LaserArguments
from peft_bituning.training.checkpoint import Checkpoint, CheckpointStore
from peft_bituning.training.resumable import ResumableTraining
from peft_bituning.training.stage_result import Weights
from peft_bituning.training.update import PassLoss, Update
from peft_bituning.training.update_plan import plan_updates
from peft_bituning.tuners.rows.embedding_model import EmbeddingModel

from .sets import CandidateSet
from .task import CandidateTask


@dataclass(frozen=True)
class KeptEpoch:
    """The best epoch of a run.

    Args:
        weights: the trained weights after it, by their names in the model.
        epoch: its number, from 1.
        valid: what validation measured.
    """

    weights: Weights
    epoch: int
    valid: dict[str, Any]


class TaskRows:
    """An epoch's rows of a task, as `EpochRows`."""

    aux_loss_coef = 0.0
    num_virtual_tokens = 0
    users: Sequence[int] | None = None

    def __init__(self, task: CandidateTask, epoch: int) -> None:
        self.task = task
        self.rows: list[CandidateSet] = task.rows(epoch)
        self.lengths: Sequence[int] = [task.length(row) for row in self.rows]
        self.weights: Sequence[int] = [task.weight(row) for row in self.rows]

    def loss(self, model: EmbeddingModel, rows: Sequence[int], is_idle: bool) -> PassLoss:
        """Run a pass with gradients; see `EpochRows.loss`."""
        return PassLoss(self.task.loss(cast(nn.Module, model), [self.rows[row] for row in rows]))


class CandidateTraining(ResumableTraining):
    """Trains whatever of a model requires gradients, and keeps the epoch that validates best.

    AdamW, warm-up and cosine over all epochs, `stage1_epochs + stage2_epochs` of them at most.

    Args:
        accelerator: accelerate's device, precision and process handling.
        task: what is trained on what.
        arguments: the run's settings.
        store: where checkpoints go.
        identity: JSON values that a resumed run must share.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: CandidateTask,
        arguments: LaserArguments,
        store: CheckpointStore,
        identity: dict[str, Any],
    ) -> None:
        # of an embedding model, updates and checkpoints ask for no more than any module has
        super().__init__(accelerator, cast(EmbeddingModel, task.model), arguments, store, identity)
        self.task = task
        self.epochs = arguments.stage1_epochs + arguments.stage2_epochs
        self.best: KeptEpoch | None = None
        self.trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def run(self) -> KeptEpoch:
        """Train, from the checkpoint that `read_checkpoint` found, if any; the model ends with the weights kept.

        Returns:
            The best epoch.

        Raises:
            NonFiniteLossError: training met a loss that is not finite.
        """
        self._begin()
        while self._goes_on(self.epochs):
            self._run_epoch()
            self._save()
        if self.best is None:
            raise CheckpointError("the checkpoint holds no epoch to keep; start again with --overwrite_output_dir")
        self.set_weights(self.best.weights)
        return self.best

    def set_weights(self, weights: Weights) -> None:
        """Put weights, by their names, into the model."""
        with torch.no_grad():
            for name, value in weights.items():
                self.trained[name].copy_(value)

    def _run_epoch(self) -> None:
        started = time.perf_counter()
        epoch = self.state.epoch
        rows = TaskRows(self.task, epoch)
        plan = plan_updates(rows.lengths, self.rows_per_update, self.arguments.seed, epoch)
        self._run_updates(rows, plan, f"epoch {epoch + 1}")
        self.model.train(False)
        metric, valid = self.task.validate(f"validating epoch {epoch + 1}")
        seconds = time.perf_counter() - started
        if self._end_epoch(metric, valid, seconds, rows=len(rows.rows), tokens=sum(rows.lengths)):
            self.best = KeptEpoch(self._weights(), self.state.epoch, valid)

    def _start_update(self) -> Update:
        updates = self.epochs * -(-len(self.task.rows(0)) // self.rows_per_update)
        return Update(self.accelerator, self._prepared, self.arguments, self.arguments.learning_rate, updates)

    def _weights(self) -> Weights:
        return {name: value.detach().cpu().clone() for name, value in self.trained.items()}

    def _kept(self) -> Checkpoint:
        groups = {"adapter": self._weights()}
        if self.best is None:
            return Checkpoint({"best": None}, groups)
        best = {"epoch": self.best.epoch, "valid": self.best.valid}
        return Checkpoint({"best": best}, {**groups, "best": self.best.weights})

    def _put_back(self, saved: Checkpoint) -> None:
        self.set_weights(saved.tensors["adapter"])
        if saved.state["best"] is not None:
            self.best = KeptEpoch(saved.tensors["best"], **saved.state["best"])
