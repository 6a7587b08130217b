"""The two stages, for every way to tune the language model: the same loss, sampling and selection."""

from typing import Any

from peft_bituning.training.stage_result import StageResult, Weights
from peft_bituning.training.stages import TwoStageTraining

from .trial import KeptWeights


class TunedTraining(TwoStageTraining):
    """The two stages for every model of `build_tuned`; its arguments are those of `TwoStageTraining`.

    A user's training rows do not stand in the same updates: for all methods alike, whatever a method's own way is.
    """

    keeps_item_weights = False  # the table alone is ranked; only who starts from here asks for what encoded it

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.together = False

    @property
    def rows_an_epoch(self) -> int:
        """Training rows of every epoch."""
        return len(self.epoch_samples(0))

    def _item_weights(self) -> Weights:
        return super()._item_weights() if self.keeps_item_weights else {}

    def without_training(self, start: KeptWeights) -> StageResult:
        """Return what a training without epochs would keep: A encodes the table, A' the users."""
        self.model.weights_in(start.items)
        self.items = self._encode_side(1, moves_center=False)  # users are centered by what A and A' have
        self.model.weights_in(start.users)
        return self._untrained()
