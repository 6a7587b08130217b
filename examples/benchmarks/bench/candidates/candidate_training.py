"""Epochs of training on candidates: one loop for letters and for titles."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from peft_bituning.errors import CheckpointError, NonFiniteLossError
from peft_bituning.training.arguments import LaserArguments
from peft_bituning.training.batches import plan_updates, share_of, split_by_tokens
from peft_bituning.training.checkpoint import Checkpoint, CheckpointStore
from peft_bituning.training.loop import AFTER_NON_FINITE
from peft_bituning.training.resumable import ResumableTraining
from peft_bituning.training.sharding import average_gradients
from peft_bituning.training.stage_result import Weights
from peft_bituning.training.state import RunningMeans

from .sets import CandidateSet
from .task import CandidateTask

logger = logging.getLogger(__name__)


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


class CandidateTraining(ResumableTraining):
    """Trains whatever of a model requires gradients, and keeps the epoch that validates best.

    AdamW, warm-up and cosine over all epochs, `stage1_epochs + stage2_epochs` of them at most.

    Args:
        accelerator: accelerate's device, precision and process handling.
        model: the model, not yet prepared by accelerate.
        task: what it is trained on.
        arguments: the run's settings.
        store: where checkpoints go.
        identity: JSON values that a resumed run must share.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        task: CandidateTask,
        arguments: LaserArguments,
        store: CheckpointStore,
        identity: dict[str, Any],
    ) -> None:
        super().__init__(accelerator, model, arguments, store, identity)
        self.model = model
        self.task = task
        self.epochs = arguments.stage1_epochs + arguments.stage2_epochs
        self.best: KeptEpoch | None = None
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay
        )
        self._optimizer = accelerator.prepare_optimizer(optimizer)
        updates = self.epochs * -(-len(task.rows(0)) // self.rows_per_update)
        self._scheduler = get_cosine_schedule_with_warmup(
            self._optimizer, int(arguments.warmup_ratio * updates), updates
        )

    def run(self) -> KeptEpoch:
        """Train, from the checkpoint that `read_checkpoint` found, if any; the model ends with the weights kept.

        Returns:
            The best epoch.

        Raises:
            NonFiniteLossError: training met a loss that is not finite.
        """
        self._started = time.perf_counter()
        state = self.state
        if self._saved is None:
            set_seed(self.arguments.seed, device_specific=True)
        else:
            self._restore(self._saved)
            self._saved, state = None, self.state
        while state.epoch < self.epochs and state.epoch - state.best_epoch < self.arguments.early_stopping_patience:
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
        state, arguments = self.state, self.arguments
        started = time.perf_counter()
        rows = self.task.rows(state.epoch)
        lengths = [self.task.length(row) for row in rows]
        updates = plan_updates(lengths, self.rows_per_update, arguments.seed, state.epoch)
        self.model.train()
        with tqdm(
            total=len(updates),
            initial=state.update,
            desc=f"epoch {state.epoch + 1}",
            unit="update",
            disable=not self._progress,
            leave=False,
        ) as bar:
            while state.update < len(updates):
                values = self._update(rows, lengths, updates[state.update])
                state.update += 1
                state.global_step += 1
                self._log(values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                bar.update()
                if state.global_step % arguments.save_steps == 0 and state.update < len(updates):
                    self._save()
        self.model.eval()
        metric, valid = self.task.validate(f"validating epoch {state.epoch + 1}")
        means = {f"train_{name}": value for name, value in state.since_epoch.means().items()}
        seconds = time.perf_counter() - started
        state.epochs.append(
            {"epoch": state.epoch + 1, "global_step": state.global_step, "rows": len(rows), "tokens": sum(lengths)}
            | {**means, "valid": valid, "seconds": seconds}
        )
        state.since_epoch = RunningMeans()
        state.epoch, state.update = state.epoch + 1, 0
        if metric > state.best_metric:
            state.best_metric, state.best_epoch = metric, state.epoch
            self.best = KeptEpoch(self._weights(), state.epoch, valid)
        if self.accelerator.is_main_process:
            logger.info(
                "epoch %d: train loss %.4f, validation %.4f, %.0f s", state.epoch, means["train_loss"], metric, seconds
            )

    def _update(self, rows: Sequence[CandidateSet], lengths: Sequence[int], numbers: Sequence[int]) -> dict[str, float]:
        """Make one optimizer update; every row has its weight, however rows fall into processes and passes."""
        accelerator, state = self.accelerator, self.state
        passes = self._passes(lengths, numbers)
        total = sum(self.task.weight(rows[number]) for number in numbers)
        summed = torch.zeros((), device=accelerator.device)
        for step, share in enumerate(passes):
            with nullcontext() if step == len(passes) - 1 else accelerator.no_sync(self._prepared):
                # a process without rows runs one without weight: the others wait for its gradients
                loss = self.task.loss(self._prepared, [rows[number] for number in share or numbers[:1]])
                loss = loss * (1.0 if share else 0.0) / total
                accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean over processes
            summed += loss.detach()
        value = float(accelerator.reduce(summed, reduction="sum"))
        where = f"epoch {state.epoch + 1}, update {state.update + 1}"
        if not torch.isfinite(torch.tensor(value)):
            raise NonFiniteLossError(f"training stopped at {where}: the loss is {value}. {AFTER_NON_FINITE}")
        average_gradients(accelerator, self._prepared)
        norm = accelerator.clip_grad_norm_(self._prepared.parameters(), self.arguments.max_grad_norm)
        grad_norm = 0.0 if norm is None else float(norm)
        if not torch.isfinite(torch.tensor(grad_norm)) and accelerator.scaler is None:
            raise NonFiniteLossError(
                f"training stopped at {where}: the loss is {value}, its gradient is not finite. {AFTER_NON_FINITE}"
            )
        rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        if not getattr(self._optimizer, "step_was_skipped", False):
            self._scheduler.step()
        self._optimizer.zero_grad()
        tokens = sum(lengths[number] for number in numbers)
        return {"loss": value, "grad_norm": grad_norm, "learning_rate": rate, "tokens": tokens}

    def _passes(self, lengths: Sequence[int], numbers: Sequence[int]) -> list[list[int]]:
        """Cut an update into this process's passes; all processes make as many, the last of some without rows."""
        world, limit = self.accelerator.num_processes, self.arguments.max_tokens_per_pass
        passes: list[list[list[int]]] = []
        for process in range(world):
            shares = share_of(numbers, process, world, self.arguments.gradient_accumulation_steps)
            if limit is not None:
                shares = [
                    part for share in shares for part in split_by_tokens(share, [lengths[n] for n in share], limit)
                ]
            passes.append([share for share in shares if share])
        most = max(map(len, passes))
        own = passes[self.accelerator.process_index]
        return own + [[]] * (most - len(own))

    def _log(self, values: dict[str, float]) -> None:
        state = self.state
        rate = values.pop("learning_rate")
        state.since_log.add(values)
        state.since_epoch.add(values)
        if state.global_step % self.arguments.logging_steps == 0:
            means = {**state.since_log.means(), "learning_rate": rate}
            state.since_log = RunningMeans()
            state.log_history.append({"epoch": state.epoch + 1, "step": state.global_step, **means})
            self.accelerator.log(means, step=state.global_step)

    def _weights(self) -> Weights:
        return {name: value.detach().cpu().clone() for name, value in self.trained.items()}

    def _moving(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        return self._optimizer, self._scheduler

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
