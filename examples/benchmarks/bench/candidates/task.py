"""The task of a training on candidates: rows, their loss, and what an epoch is chosen by."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peft_bituning.data.samples import LeaveOneOut
from peft_bituning.training.arguments import LaserArguments

from .batches import run_in_batches
from .prompts import CandidatePrompts
from .sets import CandidateSet

ResultT = TypeVar("ResultT")


@dataclass(eq=False)
class CandidateTask(ABC):
    """What a model is trained on."""

    model: nn.Module
    prompts: CandidatePrompts  # shows histories and candidates
    split: LeaveOneOut  # who is trained, validated and tested on what
    arguments: LaserArguments  # the run's; `per_device_eval_batch_size` is the prompts run at once
    pad_token_id: int  # fills shorter rows
    device: torch.device  # where the model is
    _rows: tuple[int, list[CandidateSet]] | None = field(default=None, init=False)

    def rows(self, epoch: int) -> list[CandidateSet]:
        """Return the training rows of an epoch, from 0."""
        if self._rows is None or self._rows[0] != epoch:
            self._rows = (epoch, self._epoch_rows(epoch))
        return self._rows[1]

    @abstractmethod
    def _epoch_rows(self, epoch: int) -> list[CandidateSet]:
        """Draw the training rows of an epoch."""

    @abstractmethod
    def length(self, row: CandidateSet) -> int:
        """Return the tokens of a row."""

    @abstractmethod
    def weight(self, row: CandidateSet) -> int:
        """Return what a row counts in the mean loss of an update."""

    @abstractmethod
    def loss(self, model: nn.Module, rows: Sequence[CandidateSet]) -> Tensor:
        """Return the sum of the rows' losses, each times its weight; the model is as accelerate prepared it."""

    @abstractmethod
    def validate(self, description: str) -> tuple[float, dict[str, Any]]:
        """Return the number an epoch is chosen by, greater is better, and what else was measured."""

    def _run(
        self, run: Callable[[list[int]], Sequence[ResultT]], lengths: Sequence[int], description: str
    ) -> list[ResultT]:
        """Run rows by number in batches, without dropout; with a description there is a progress bar."""
        was_training = self.model.training
        self.model.eval()
        progress = bool(description) and not self.arguments.disable_tqdm
        try:
            return run_in_batches(run, lengths, self.arguments.per_device_eval_batch_size, progress, description)
        finally:
            self.model.train(was_training)
