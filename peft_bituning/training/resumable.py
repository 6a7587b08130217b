"""Trainings that survive a kill: who they are, their epochs of updates, and what a checkpoint holds of any of them."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from tqdm.auto import tqdm

from ..artifacts import differences
from ..errors import CheckpointError
from ..tuners.rows.embedding_model import EmbeddingModel
from .arguments import LaserArguments
from .checkpoint import (
    Checkpoint,
    CheckpointStore,
    flatten_optimizer,
    random_state,
    restore_optimizer,
    restore_random_state,
)
from .sharding import prepare_model
from .update import EpochRows, Update

logger = logging.getLogger(__name__)

LOGGED = ("loss", "contrastive_loss", "aux_loss", "grad_norm", "tokens")
FORMAT_VERSION = 2  # of what a checkpoint holds


@dataclass
class RunningMeans:
    """Sums over the updates since the last reset, kept in checkpoints so that a resumed log is the same log.

    Args:
        updates: how many.
        sums: sums of the logged values.
    """

    updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Add the values of one update."""
        self.updates += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return the means."""
        return {name: value / max(1, self.updates) for name, value in self.sums.items()}


@dataclass
class TrainingState:
    """The position of a run and what it has seen.

    Args:
        stage: 1, 2, or 3 once both stages are over.
        epoch: epochs of the stage that are over.
        update: updates of the running epoch that are over.
        global_step: updates over both stages.
        seconds: seconds spent in the stages, over all runs that led here.
        best_epoch: number of the stage's best epoch, from 1; 0 before the first.
        best_metric: its validation NDCG; -1 before the first.
        epochs: one record an epoch.
        log_history: one record every `logging_steps` updates.
        since_log: means since the last log record.
        since_epoch: means since the start of the epoch.
        expert_rows: rows each expert took since the start of the epoch.
    """

    stage: int = 1
    epoch: int = 0
    update: int = 0
    global_step: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_metric: float = -1.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    since_log: RunningMeans = field(default_factory=RunningMeans)
    since_epoch: RunningMeans = field(default_factory=RunningMeans)
    expert_rows: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingState":
        """Build the state from what `to_dict` returned."""
        running = {name: RunningMeans(**values[name]) for name in ("since_log", "since_epoch")}
        return cls(**{**values, **running})


class ResumableTraining:
    """A training whose checkpoints hold everything that decides what comes next.

    Args:
        accelerator: accelerate's device, precision and process handling.
        model: the model, not yet prepared by accelerate.
        arguments: the run's settings.
        store: where checkpoints go.
        identity: JSON values that a resumed run must share.
    """

    constant_groups = ""  # tensor groups of checkpoints whose name begins with this never change under one name

    def __init__(
        self,
        accelerator: Accelerator,
        model: EmbeddingModel,
        arguments: LaserArguments,
        store: CheckpointStore,
        identity: dict[str, Any],
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.arguments = arguments
        self.store = store
        self.identity = {**identity, "arguments": arguments.trajectory(), "processes": accelerator.num_processes}
        self.state = TrainingState()
        self.update: Update | None = None
        self.rows_per_update = (
            arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        )
        self._saved: Checkpoint | None = None
        # Prepared before anything is encoded: mixed precision then holds for every item table, resumed or not.
        self._prepared = cast(EmbeddingModel, prepare_model(accelerator, cast(nn.Module, model)))
        self._started = time.perf_counter()

    # ------------------------------------------------------------------ what a training is made of

    def _start_update(self) -> Update:
        """Make the optimizer and the schedule of the present stage."""
        raise NotImplementedError

    def _kept(self) -> Checkpoint:
        """What a checkpoint holds beside the optimizer, the schedule, the scaler and the random generators."""
        raise NotImplementedError

    def _put_back(self, saved: Checkpoint) -> None:
        """Take over what `_kept` returned; `state` is there."""
        raise NotImplementedError

    # ------------------------------------------------------------------ epochs

    @property
    def _progress(self) -> bool:
        return self.accelerator.is_main_process and not self.arguments.disable_tqdm

    def _begin(self) -> bool:
        """Go on from the checkpoint that was read; False where there is none and the run starts at its beginning."""
        self._started = time.perf_counter()
        if self._saved is None:
            set_seed(self.arguments.seed, device_specific=True)  # processes draw different dropout masks
            return False
        self._restore(self._saved)
        self._saved = None
        return True

    def _run_updates(self, rows: EpochRows, plan: Sequence[Sequence[int]], name: str) -> None:
        """Make the updates of an epoch that are left, with checkpoints on the way.

        Args:
            rows: the epoch's.
            plan: row numbers, one list per update.
            name: of the epoch.
        """
        state, update = self.state, self.update or self._start_update()
        self.update = update
        self.model.train()
        with tqdm(
            total=len(plan),
            initial=state.update,
            desc=name.replace(",", ""),
            unit="update",
            disable=not self._progress,
            leave=False,
        ) as bar:
            while state.update < len(plan):
                values = update.run(rows, plan[state.update], f"{name}, update {state.update + 1}")
                state.update += 1
                state.global_step += 1
                self._log(values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                bar.update()
                if state.global_step % self.arguments.save_steps == 0 and state.update < len(plan):
                    self._save()

    def _log(self, values: dict[str, Any]) -> None:
        state = self.state
        numbers = {name: values[name] for name in LOGGED}
        state.since_log.add(numbers)
        state.since_epoch.add(numbers)
        counts = values["expert_rows"]
        state.expert_rows = [a + b for a, b in zip(state.expert_rows or [0] * len(counts), counts, strict=True)]
        if state.global_step % self.arguments.logging_steps:
            return
        means = {**state.since_log.means(), "learning_rate": values["learning_rate"]}
        state.since_log = RunningMeans()
        state.log_history.append({"stage": state.stage, "epoch": state.epoch + 1, "step": state.global_step, **means})
        self.accelerator.log(means, step=state.global_step)

    def _end_epoch(self, metric: float, valid: dict[str, Any], seconds: float, **more: Any) -> bool:
        """Write an epoch down; say whether it is the best of its stage so far.

        Args:
            metric: what epochs are chosen by, greater is better.
            valid: what else validation measured.
            seconds: how long its updates took.
            more: whatever else the record holds.
        """
        state, total = self.state, sum(self.state.expert_rows)
        means = {f"train_{name}": value for name, value in state.since_epoch.means().items()}
        load = [rows / total for rows in state.expert_rows] if total else None
        record = {
            "stage": state.stage,
            "epoch": state.epoch + 1,
            "global_step": state.global_step,
            **means,
            "valid": valid,
            "expert_load": load,
            "seconds": seconds,
            **more,
        }
        state.epochs.append(record)
        state.since_epoch, state.expert_rows = RunningMeans(), []
        state.epoch, state.update = state.epoch + 1, 0
        if self.accelerator.is_main_process:
            logger.info(
                "stage %d epoch %d: train loss %.4f, validation %.4f, expert load %s, %.0f s",
                state.stage,
                state.epoch,
                means["train_loss"],
                metric,
                "-" if load is None else [round(share, 2) for share in load],
                seconds,
            )
        if metric <= state.best_metric:
            return False
        state.best_metric, state.best_epoch = metric, state.epoch
        return True

    def _goes_on(self, epochs: int) -> bool:
        """Whether the stage has another epoch: there are some left, and patience is."""
        state = self.state
        return state.epoch < epochs and state.epoch - state.best_epoch < self.arguments.early_stopping_patience

    # ------------------------------------------------------------------ checkpoints

    @property
    def is_resumed(self) -> bool:
        """Whether `read_checkpoint` found something to go on from; `run` forgets it."""
        return self._saved is not None

    def read_checkpoint(self) -> None:
        """Read the last checkpoint where `arguments.resume` is set; `run` goes on from there.

        Raises:
            CheckpointError: the checkpoint belongs to another run or another version, or every one is damaged.
        """
        if not self.arguments.resume:
            return
        self._saved = self.store.load_latest()
        if self._saved is None:
            logger.info("there is no checkpoint to go on from: training starts at the beginning")
            return
        found = self._saved.state.get("format_version", 1)
        if found != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint must be of this version of peft_bituning (format {FORMAT_VERSION}), got format "
                f"{found}; resume with the version that wrote it, or start again with --overwrite_output_dir"
            )
        if different := differences(self._saved.state["identity"], self.identity):
            raise CheckpointError(
                f"the checkpoint belongs to another run: {'; '.join(different)}; resume with the same settings, or "
                "start again with --overwrite_output_dir"
            )

    def _save(self) -> None:
        """Write a checkpoint; all processes call it."""
        states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            self.state.seconds += time.perf_counter() - self._started
            self._started = time.perf_counter()
            kept = self._kept()
            values: dict[str, Any] = {
                "format_version": FORMAT_VERSION,
                "identity": self.identity,
                "training": self.state.to_dict(),
                "random": states,
                "optimizer": None,
                **kept.state,
            }
            groups = dict(kept.tensors)
            if self.update is not None:
                values["optimizer"], groups["optimizer"] = flatten_optimizer(self.update.optimizer)
                values["scheduler"] = self.update.scheduler.state_dict()
            if self.accelerator.scaler is not None:
                values["scaler"] = self.accelerator.scaler.state_dict()
            self.store.save(self.state.global_step, Checkpoint(values, groups), self.constant_groups)
        self.accelerator.wait_for_everyone()

    def _restore(self, saved: Checkpoint) -> None:
        values = saved.state
        self.state = TrainingState.from_dict(values["training"])
        self._put_back(saved)
        if values["optimizer"] is not None:
            self.update = self._start_update()
            restore_optimizer(self.update.optimizer, values["optimizer"], saved.tensors["optimizer"])
            self.update.scheduler.load_state_dict(values["scheduler"])
        if self.accelerator.scaler is not None and "scaler" in values:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        restore_random_state(values["random"][self.accelerator.process_index])
        state = self.state
        logger.info("resuming at stage %d, epoch %d, update %d", state.stage, state.epoch + 1, state.update)
