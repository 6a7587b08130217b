"""The run of a trial that tunes a language model: from the process to what describes it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from peft_bituning.artifacts import to_json
from peft_bituning.assembly import pad_token_id
from peft_bituning.errors import ConfigurationError
from peft_bituning.launch import launched_state
from peft_bituning.recommenders import IDRecommender, Precomputed, build_recommender
from peft_bituning.training.checkpoint import CheckpointStore
from peft_bituning.training.resumable import ResumableTraining
from peft_bituning.training.sharding import check_launcher

from ..cells import CHECKPOINTS
from .frozen_recommenders import frozen_recommender
from .meter import Meter
from .trial import Trial

KeptT = TypeVar("KeptT")


class NothingKnown(Precomputed):
    """The recommender of a catalog that nobody was trained on: it knows no item, so that every row is cold.

    Args:
        embedding_dim: C, as the adapter reads it.
    """

    recommender_type = "nothing-known"

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(torch.zeros(1, embedding_dim))

    def encoded_mask(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Give no position a state [B, N]."""
        return torch.zeros_like(super().encoded_mask(item_indices, mask))


class TrialRun:
    """A trial that has begun: what it reads is loaded, and the random state is that of its seed.

    Raises:
        ConfigurationError: there is neither anybody to train on nor a start, or the recommender is no known one.
    """

    def __init__(self, trial: Trial, reads_recommender: bool) -> None:
        if not trial.is_trained and trial.start is None:
            raise ConfigurationError(
                f"{trial.method} must have users to train on, or weights to start from, got neither"
            )
        arguments = trial.arguments
        launched_state()
        self.trial = trial
        self.accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
        check_launcher(self.accelerator)
        self.device = self.accelerator.device
        self.meter = Meter(self.device)
        self.store = CheckpointStore(trial.folder / CHECKPOINTS, arguments.save_total_limit)
        self.known: IDRecommender | None = None
        self._known_seconds: float | None = None
        set_seed(arguments.seed)
        if reads_recommender and trial.is_trained:
            self.known, self._known_seconds = frozen_recommender(trial, arguments.id_recommender, self.accelerator)
        elif reads_recommender:
            self.known = NothingKnown(build_recommender(arguments.id_recommender, 1).embedding_dim)
        self.base = trial.load_base()
        self.pad = pad_token_id(self.base.tokenizer)
        set_seed(arguments.seed)

    def identity(self, adapter: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        """Return what a resumed run must share, its adapter's settings and `more`, as JSON values."""
        trial = self.trial
        identity = {
            "method": trial.method,
            "data": trial.data.content_hash,
            "base_model": {"name": self.base.name, **self.base.fingerprint()},
            "recommender": None if self.known is None else self.known.content_hash(),
            "adapter": adapter,
            **more,
        }
        if trial.drawn is not None:
            identity["training_users"] = trial.drawn
        if trial.start is not None:
            identity["start"] = trial.start.content_hash()
        return dict(to_json(identity))

    def train(self, training: ResumableTraining, run: Callable[[], KeptT]) -> KeptT:
        """Train as the phase `training`, whose seconds are those of all processes that the training took."""
        resumed = training.is_resumed
        with self.meter.phase("training"):
            kept = run()
        self.meter.phases["training"] |= {"seconds": training.state.seconds, "resumed": resumed}
        return kept

    def details(
        self, best_epoch: int, epochs: list[dict[str, Any]], adapter: dict[str, Any] | None, **more: Any
    ) -> dict[str, Any]:
        """Describe the run, its best epoch and what was measured in each, as JSON values."""
        known = None if isinstance(self.known, NothingKnown) else self.known
        recommender = known and {
            "kind": known.recommender_type,
            "parameters": sum(value.numel() for value in known.parameters()),
            "seconds": self._known_seconds,
        }
        return {
            "best_epoch": best_epoch,
            "epochs": epochs,
            "adapter": adapter,
            **more,
            "frozen_recommender": recommender,
        }
