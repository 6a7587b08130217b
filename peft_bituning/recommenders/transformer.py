"""The shared body of SASRec and BERT4Rec: `transformers`' BERT stack over item tokens.

Shapes: `B` rows, `L` packed history length, `C` width, `I` catalog items, `M` training positions.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Generator, Tensor
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel

from ..errors import ArtifactError, ConfigurationError
from .base import IDRecommender
from .base import mask_of_lengths as mask_of_lengths
from .saving import check_names, load_folder

SIZES = (
    "num_items",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_history_length",
)


class ItemSequenceConfig(PreTrainedConfig):
    """Sizes of a transformer over item sequences.

    Args:
        num_items: Catalog size I.
        hidden_size: Width C of the states.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads of a block; `hidden_size` is a multiple of it.
        intermediate_size: Width of the feed-forward layers; `None` is 4 x `hidden_size`.
        max_history_length: Longest history used (`max_length` is a generation setting to `transformers`).
        dropout: Probability for embeddings and sublayers in training.
        attention_dropout: Probability for attention weights in training.
        initializer_range: Standard deviation of the initial weights.
        untrained_items: Catalog indices without a training event by construction, which are read as new items are.
    """

    def __init__(
        self,
        num_items: int = 1,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int | None = None,
        max_history_length: int = 50,
        dropout: float = 0.5,
        attention_dropout: float = 0.5,
        initializer_range: float = 0.02,
        untrained_items: list[int] | None = None,
        **arguments: Any,
    ) -> None:
        if "max_length" in arguments:
            raise ConfigurationError("max_length is not a field of this config, use max_history_length")
        self.num_items = num_items
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.max_history_length = max_history_length
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.untrained_items = untrained_items
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if hidden_size % num_attention_heads:
            raise ConfigurationError(
                f"hidden_size must be a multiple of num_attention_heads ({num_attention_heads}), got {hidden_size!r}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        super().__init__(**arguments)


class ItemSequenceModel(IDRecommender, PreTrainedModel):
    """A stack of BERT blocks over items, with the item embeddings as output weights."""

    config_class: Any = ItemSequenceConfig
    config: ItemSequenceConfig
    base_model_prefix = "encoder"

    def __init__(self, config: ItemSequenceConfig, *, causal: bool, extra_tokens: int) -> None:
        super().__init__(config)
        self.embedding_dim = config.hidden_size
        self.max_length = config.max_history_length
        self.encoder = BertModel(
            BertConfig(
                vocab_size=config.num_items + extra_tokens,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.attention_dropout,
                max_position_embeddings=config.max_history_length + extra_tokens,
                type_vocab_size=1,
                initializer_range=config.initializer_range,
                pad_token_id=None,
                is_decoder=causal,
                use_cache=False,
                attn_implementation="sdpa",  # type: ignore[call-arg]
            ),
            add_pooling_layer=False,
        )

    @property
    def num_items(self) -> int:  # type: ignore[override]
        """Catalog size I, which changes where a model moves to another catalog."""
        return self.config.num_items

    @property
    def item_weights(self) -> Tensor:
        """Item embeddings `[I, C]`, input and output alike."""
        return self.encoder.embeddings.word_embeddings.weight[: self.num_items]

    def essentials(self) -> dict[str, Any]:
        """Return the settings that decide what the weights compute."""
        left_out = self.untrained_items
        return {name: getattr(self.config, name) for name in SIZES} | (
            {"untrained_items": left_out} if left_out else {}
        )

    @property
    def untrained_items(self) -> list[int]:  # type: ignore[override]
        """Catalog indices that get no state."""
        return self.config.untrained_items or []

    def training_loss(self, item_indices: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
        """Return the model's own training loss over one batch, a scalar.

        Rows are `[B, L]` catalog indices from column 0 on, L at most `max_length` + 1, with lengths `[B]` of at least
        two items: something to see and something to predict. The generator gives what is random beside dropout.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **arguments: Any) -> Any:
        """Load a saved model from a folder or the Hub, as in `transformers`; an ArtifactError where that warns."""
        if Path(pretrained_model_name_or_path).is_dir() and not (model_args or arguments):
            return load_folder(cls, Path(pretrained_model_name_or_path))
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **arguments
            )
        except (SafetensorError, RuntimeError) as error:
            raise ArtifactError(f"{pretrained_model_name_or_path} cannot be loaded: {error}") from error
        model, info = loaded
        check_names(pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"])
        return model
