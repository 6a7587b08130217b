"""The two stages, for every way to tune the language model: the same loss, sampling and selection."""

from dataclasses import dataclass
from typing import cast

from peft_bituning.training.stage_result import StageResult, Weights
from peft_bituning.training.stages import TwoStageTraining
from peft_bituning.tuners.bituning import EmbeddingCenter, PrefixEncoder

from ..pooling import PooledModel
from .trial import KeptWeights
from .tuners import load_trained, num_virtual_tokens, trained_weights


class TunedTraining(TwoStageTraining):
    """The two stages for every model of `build_tuned`; its arguments are those of `TwoStageTraining`.

    A `PooledModel` is kept by its trained weights as they are named: PEFT's own files hold what P-tuning's encoder
    computes and not the encoder, and full fine-tuning has no adapter.
    """

    keeps_item_weights = False  # the table alone is ranked; only who starts from here asks for what encoded it

    @property
    def rows_an_epoch(self) -> int:
        """Training rows of every epoch."""
        return len(self._epoch_samples(0))

    @property
    def _pooled(self) -> PooledModel | None:
        return self.model if isinstance(self.model, PooledModel) else None

    @property
    def _prefix_encoder(self) -> PrefixEncoder:
        if self._pooled is None:
            return super()._prefix_encoder
        return cast(PrefixEncoder, _NoEncoder(num_virtual_tokens(self._pooled)))

    @property
    def _aux_loss_coef(self) -> float:
        return 0.0 if self._pooled is not None else super()._aux_loss_coef

    @property
    def _embedding_center(self) -> EmbeddingCenter | None:
        return super()._embedding_center if self._pooled is None else self._pooled.embedding_center

    def _weights(self) -> Weights:
        return super()._weights() if self._pooled is None else trained_weights(self._pooled)

    def _item_weights(self) -> Weights:
        return self._weights() if self.keeps_item_weights else {}

    def without_training(self, start: KeptWeights) -> StageResult:
        """Return what a training without epochs would keep: A encodes the table, A' the users."""
        self.set_weights(start.items)
        self.items = self._encode_side(1, center=False)  # users are centered by what A and A' have
        self.set_weights(start.users)
        return self._untrained()

    def set_weights(self, weights: Weights) -> None:
        """Put weights that a stage kept into the trained model."""
        if self._pooled is None:
            super().set_weights(weights)
        else:
            load_trained(self._pooled, weights)


@dataclass(frozen=True)
class _NoEncoder:
    """What training asks of a prefix encoder, said of a model that has none."""

    num_tokens: int
    needs_collaborative: bool = False
