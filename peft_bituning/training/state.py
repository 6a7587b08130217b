"""Where a training run stands: everything a resumed run needs beside tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any


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
