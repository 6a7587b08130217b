"""What trainings that survive a kill have in common: who they are, and what a checkpoint holds of any of them."""

import logging
import time
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..artifacts import differences
from ..errors import CheckpointError
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
from .state import TrainingState

logger = logging.getLogger(__name__)


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
        model: nn.Module,
        arguments: LaserArguments,
        store: CheckpointStore,
        identity: dict[str, Any],
    ) -> None:
        self.accelerator = accelerator
        self.arguments = arguments
        self.store = store
        self.identity = {**identity, "arguments": arguments.trajectory(), "processes": accelerator.num_processes}
        self.state = TrainingState()
        self.rows_per_update = (
            arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        )
        self._saved: Checkpoint | None = None
        # Prepared before anything is encoded: mixed precision then holds for every item table, resumed or not.
        self._prepared = prepare_model(accelerator, cast(PeftModel, model))
        self._started = time.perf_counter()

    @property
    def is_resumed(self) -> bool:
        """Whether `read_checkpoint` found something to go on from; `run` forgets it."""
        return self._saved is not None

    def read_checkpoint(self) -> None:
        """Read the last checkpoint where `arguments.resume` is set; `run` goes on from there.

        Raises:
            CheckpointError: the checkpoint belongs to another run, or every one is damaged.
        """
        if not self.arguments.resume:
            return
        self._saved = self.store.load_latest()
        if self._saved is None:
            logger.info("there is no checkpoint to go on from: training starts at the beginning")
        elif different := differences(self._saved.state["identity"], self.identity):
            raise CheckpointError(
                f"the checkpoint belongs to another run: {'; '.join(different)}; resume with the same settings, or "
                "start again with --overwrite_output_dir"
            )

    @property
    def _progress(self) -> bool:
        return self.accelerator.is_main_process and not self.arguments.disable_tqdm

    def _moving(self) -> tuple[Optimizer, LRScheduler] | None:
        """The optimizer and the scheduler, where there are any yet."""
        raise NotImplementedError

    def _kept(self) -> Checkpoint:
        """What a checkpoint holds beside the optimizer, the scheduler, the scaler and the random generators."""
        raise NotImplementedError

    def _put_back(self, saved: Checkpoint) -> None:
        """Take over what `_kept` returned; `state` is there, and with a saved optimizer there is to be one again."""
        raise NotImplementedError

    def _save(self) -> None:
        """Write a checkpoint; all processes call it."""
        states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            self.state.seconds += time.perf_counter() - self._started
            self._started = time.perf_counter()
            kept = self._kept()
            values: dict[str, Any] = {
                "identity": self.identity,
                "training": self.state.to_dict(),
                "random": states,
                "optimizer": None,
                "scheduler": None,
                **kept.state,
            }
            groups = dict(kept.tensors)
            if (moving := self._moving()) is not None:
                values["optimizer"], groups["optimizer"] = flatten_optimizer(moving[0])
                values["scheduler"] = moving[1].state_dict()
            if self.accelerator.scaler is not None:
                values["scaler"] = self.accelerator.scaler.state_dict()
            self.store.save(self.state.global_step, Checkpoint(values, groups), self.constant_groups)
        self.accelerator.wait_for_everyone()

    def _restore(self, saved: Checkpoint) -> None:
        values = saved.state
        self.state = TrainingState.from_dict(values["training"])
        self._put_back(saved)
        if values["optimizer"] is not None and (moving := self._moving()) is not None:
            restore_optimizer(moving[0], values["optimizer"], saved.tensors["optimizer"])
            moving[1].load_state_dict(values["scheduler"])
        if self.accelerator.scaler is not None and "scaler" in values:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        restore_random_state(values["random"][self.accelerator.process_index])
        state = self.state
        logger.info("resuming at stage %d, epoch %d, update %d", state.stage, state.epoch + 1, state.update)
