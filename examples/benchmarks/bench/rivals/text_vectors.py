"""Frozen text vectors of a catalog, and the models that carry them.

Shapes: `I` catalog items, `D` width of the vectors.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from peft_bituning.recommenders import Precomputed
from peft_bituning.recommenders.sasrec import SASRec, SASRecConfig
from peft_bituning.ssna.side_network import standardise


class TextVectorConfig(SASRecConfig):
    """Sizes of a model over frozen text vectors.

    Args:
        text_size: D; taken from the vectors.
        arguments: See `ItemSequenceConfig`.
    """

    def __init__(self, text_size: int = 1, **arguments: Any) -> None:
        self.text_size = text_size
        super().__init__(**arguments)


class TextVectorModel(SASRec):
    """A model that keeps text vectors `[I, D]` beside its weights; they are saved with it and never trained.

    It reads them through `text_norm`, which starts as `standardise` leaves it.
    """

    config_class: Any = TextVectorConfig
    config: TextVectorConfig
    text_vectors: Tensor

    def __init__(self, config: TextVectorConfig) -> None:
        super().__init__(config)
        self.text_norm = nn.LayerNorm(config.text_size)
        self.register_buffer("text_vectors", torch.zeros(config.num_items, config.text_size))

    @classmethod
    def from_vectors(cls, text_vectors: Any, *, seed: int = 0, **settings: Any) -> Self:
        """Build an untrained model; the same seed gives the same weights.

        Args:
            text_vectors: `[I, D]` finite numbers, one row an item; of cached states `[I, a, D]` one layer of them.
            seed: Of the initial weights; torch's global random state is left as it was.
            settings: Other fields of its config.

        Returns:
            The model, ready for `fit_recommender`.

        Raises:
            InputError: The vectors are not `[I, D]`, or not finite.
            ConfigurationError: A setting is out of its range.
        """
        vectors = Precomputed(text_vectors).embeddings  # checked there
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(cls.config_class(num_items=len(vectors), text_size=vectors.shape[1], **settings))
        model.text_vectors.copy_(vectors)
        standardise(model.text_norm, [vectors])
        return model

    def essentials(self) -> dict[str, Any]:
        """Return the settings that decide what the weights compute."""
        return {**super().essentials(), "text_size": self.config.text_size}
