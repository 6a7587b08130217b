"""Trials on candidates: their prompts, their training, their result."""

from typing import Any

import torch

from peft_bituning.data.samples import LeaveOneOut
from peft_bituning.training.arguments import LaserArguments
from peft_bituning.tuners.rows.backbone import max_positions
from peft_bituning.tuners.rows.embedding_model import EmbeddingModel

from ..candidates import CandidatePrompts, CandidateTask, CandidateTraining, ChoiceTemplate
from .trial import ReportT, TrialResult
from .trial_run import TrialRun
from .tuners import adapter_bytes, adapter_config, num_trainable


class CandidateRun(TrialRun):
    """A trial on candidates that has begun; its arguments are those of `TrialRun`."""

    def prompts(self, template: ChoiceTemplate, size: int) -> CandidatePrompts:
        """Set up prompts by `LETTERS` or `TITLES`, with so many candidates, that fit the model's context."""
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

    def common(
        self, prompts: CandidatePrompts
    ) -> tuple[CandidatePrompts, LeaveOneOut, LaserArguments, int, torch.device]:
        """Return what every `CandidateTask` takes after its model."""
        return prompts, self.trial.split, self.trial.arguments, self.pad, self.device

    def train_on(self, task: CandidateTask, model: EmbeddingModel, candidates: dict[str, Any]) -> None:
        """Train a task's model, which `build_tuned` gave, from its last checkpoint on; it ends with the weights
        kept.
        """
        self.model, self.candidates, self.adapter = model, candidates, adapter_config(model)
        identity = self.identity(self.adapter, candidates=candidates)
        self.training = CandidateTraining(self.accelerator, task, self.trial.arguments, self.store, identity)
        self.training.read_checkpoint()
        self.kept = self.train(self.training, self.training.run)

    def result(self, report: ReportT, **found: Any) -> TrialResult[ReportT]:
        """Put together what `train_on` left, the report of the test users, and what was `found` of the candidates."""
        state = self.training.state
        sums = {name: sum(epoch[name] for epoch in state.epochs) for name in ("rows", "tokens")}
        return TrialResult(
            report,
            self.kept.valid,
            num_trainable(self.model),
            adapter_bytes(self.model),
            self.meter.phases,
            {"epochs": len(state.epochs), "updates": state.global_step, **sums},
            self.details(self.kept.epoch, state.epochs, self.adapter, candidates={**self.candidates, **found}),
        )
