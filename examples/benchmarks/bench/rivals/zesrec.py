"""ZESRec-style: frozen text vectors, one learned projection, a sequence model; an item is its text alone.

After Ding et al., "Zero-Shot Recommender Systems", 2021, with our causal transformer as the sequence model.
Shapes: `I` catalog items, `D` width of the text vectors, `C` width of the model.
"""

from typing import Any

from torch import Tensor, nn

from peft_bituning.ssna.model import TextSASRec

from .text_vectors import TextVectorConfig, TextVectorModel


class ZESRecConfig(TextVectorConfig):
    """Sizes of a `ZESRec`; see `TextVectorConfig` for the arguments."""

    model_type = "zesrec"

    # transformers makes a dataclass of every config class that has no __init__ of its own
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class ZESRec(TextSASRec, TextVectorModel):
    """SASRec over `e_i = W LayerNorm(t_i)` of frozen text vectors, as inputs and as targets.

    Built by `from_vectors`.

    Args:
        config: Sizes.
    """

    config_class = ZESRecConfig
    config: ZESRecConfig
    recommender_type = "zesrec"

    def __init__(self, config: ZESRecConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.text_size, config.hidden_size)
        self.post_init()

    def embed_items(self) -> Tensor:
        """Project the text vectors, with gradients where they are enabled.

        Returns:
            `[I, C]`.
        """
        return self.projection(self.text_norm(self.text_vectors))
