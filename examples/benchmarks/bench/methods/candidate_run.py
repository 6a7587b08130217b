"""Trials on candidates: their prompts, their training, their result."""

from typing import Any

from torch import nn

from peft_bituning.tuners.rows.backbone import max_positions

from ..candidates import CandidatePrompts, CandidateTask, CandidateTraining, ChoiceTemplate
from .trial import ReportT, TrialResult
from .trial_run import TrialRun
from .tuners import adapter_bytes, adapter_config, num_trainable


class CandidateRun(TrialRun):
    """A trial on candidates that has begun; its arguments are those of `TrialRun`."""

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

    def train_on(self, task: CandidateTask, model: nn.Module, candidates: dict[str, Any]) -> None:
        """Train a task's model from its last checkpoint on, if there is one; it ends with the weights kept.

        Args:
            task: what it is trained on.
            model: what `build_tuned` returned of it.
            candidates: what is said of the candidates.
        """
        self.model, self.candidates, self.adapter = model, candidates, adapter_config(model)
        identity = self.identity(self.adapter, candidates=candidates)
        self.training = CandidateTraining(
            self.accelerator, task.model, task, self.trial.arguments, self.store, identity
        )
        self.training.read_checkpoint()
        self.kept = self.train(self.training, self.training.run)

    def result(self, report: ReportT, **found: Any) -> TrialResult[ReportT]:
        """Put together what `train_on` left and what was measured then.

        Args:
            report: of the test users.
            found: what else is said of the candidates.
        """
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
