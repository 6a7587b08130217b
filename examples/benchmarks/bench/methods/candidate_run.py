"""What trials on candidates have in common, from the frozen recommender to what training ran over."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from peft_bituning.training.results import data_hash
from torch import nn

from peft_bituning.artifacts import to_json
from peft_bituning.launch import launched_state
from peft_bituning.recommenders import IDRecommender
from peft_bituning.serving.recommender import pad_token_id
from peft_bituning.training.checkpoint import CheckpointStore
from peft_bituning.training.sharding import check_launcher
from peft_bituning.tuners.rows.backbone import max_positions

from ..candidates import CandidatePrompts, CandidateTask, CandidateTraining, ChoiceTemplate, KeptEpoch
from .frozen_recommenders import frozen_recommender, recommender_details
from .measuring import Meter
from .trial import Trial
from .tuned_methods import CHECKPOINTS


class CandidateRun:
    """A trial on candidates: what it reads is loaded, the random state is that of its seed.

    Args:
        trial: the trial.
        reads_recommender: whether it reads a frozen recommender.
    """

    def __init__(self, trial: Trial, reads_recommender: bool) -> None:
        arguments = trial.arguments
        launched_state()
        self.trial = trial
        self.accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
        check_launcher(self.accelerator)
        self.device = self.accelerator.device
        self.meter = Meter(self.device)
        set_seed(arguments.seed)
        self.known: IDRecommender | None = None
        self._seconds: float | None = None
        self.epochs: list[dict[str, Any]] = []
        if reads_recommender:
            self.known, self._seconds = frozen_recommender(trial, arguments.recommender, self.accelerator)
            self.known = self.known.to(self.device).eval()
        self.base = trial.load_base()
        self.pad = pad_token_id(self.base.tokenizer)
        set_seed(arguments.seed)

    def prompts(self, template: ChoiceTemplate, size: int) -> CandidatePrompts:
        """Set up prompts that fit the model's context.

        Args:
            template: `LETTERS` or `TITLES`.
            size: candidates a prompt.
        """
        arguments, limit = self.trial.arguments, max_positions(self.base.model)
        return CandidatePrompts(
            template,
            self.base.tokenizer,
            self.trial.data.items,
            size,
            arguments.max_length if limit is None else min(arguments.max_length, limit),
            arguments.max_history,
            arguments.max_item_tokens,
        )

    def train(
        self, model: nn.Module, task: CandidateTask, adapter: dict[str, Any] | None, candidates: dict[str, Any]
    ) -> tuple[KeptEpoch, dict[str, Any]]:
        """Train from the last checkpoint on, if there is one, as the phase `training`.

        Args:
            model: what is trained; it ends with the weights kept.
            task: what it is trained on.
            adapter: its settings.
            candidates: what is said of the candidates.

        Returns:
            The best epoch; and `epochs`, `updates`, `rows` and `tokens` that training ran over.
        """
        trial = self.trial
        identity: dict[str, Any] = {
            "method": trial.method,
            "data": data_hash(trial.data),
            "base_model": {"name": self.base.name, **self.base.fingerprint()},
            "recommender": None if self.known is None else self.known.content_hash(),
            "adapter": adapter,
            "candidates": candidates,
        }
        if trial.drawn is not None:
            identity["training_users"] = trial.drawn
        store = CheckpointStore(trial.folder / CHECKPOINTS, trial.arguments.save_total_limit)
        training = CandidateTraining(self.accelerator, model, task, trial.arguments, store, to_json(identity))
        training.read_checkpoint()
        resumed = training.is_resumed
        with self.meter.phase("training"):
            kept = training.run()
        self.epochs = training.state.epochs
        self.meter.phases["training"] |= {"seconds": training.state.seconds, "resumed": resumed}
        return kept, {
            "epochs": len(self.epochs),
            "updates": training.state.global_step,
            "rows": sum(epoch["rows"] for epoch in self.epochs),
            "tokens": sum(epoch["tokens"] for epoch in self.epochs),
        }

    def details(self, kept: KeptEpoch, adapter: dict[str, Any] | None, candidates: dict[str, Any]) -> dict[str, Any]:
        """Return what else describes the run, as JSON values."""
        return {
            "best_epoch": kept.epoch,
            "epochs": self.epochs,
            "adapter": adapter,
            "candidates": candidates,
            "frozen_recommender": None if self.known is None else recommender_details(self.known, self._seconds),
        }
