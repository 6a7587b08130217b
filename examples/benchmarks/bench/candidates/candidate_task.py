"""What a training on candidates asks of what is trained."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from .candidate_sets import CandidateSet


class CandidateTask(Protocol):
    """What is trained: rows, their loss, and what an epoch is chosen by."""

    def rows(self, epoch: int) -> list[CandidateSet]:
        """Return the training rows of an epoch, from 0."""

    def length(self, row: CandidateSet) -> int:
        """Return the tokens of a row."""

    def weight(self, row: CandidateSet) -> int:
        """Return what a row counts in the mean loss of an update."""

    def loss(self, model: nn.Module, rows: Sequence[CandidateSet]) -> Tensor:
        """Return the sum of the rows' losses, each times its weight; the model is as accelerate prepared it."""

    def validate(self, description: str) -> tuple[float, dict[str, Any]]:
        """Return the number an epoch is chosen by, greater is better, and what else was measured."""
