"""Settings of the side network and of the sequence model over its items."""

from typing import Any

from ..errors import ConfigurationError
from ..recommenders import SASRecConfig

POOLINGS = ("last", "mean")


class SSNAConfig(SASRecConfig):
    """Sizes of an `SSNA`.

    `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size`, `max_history_length`, `dropout` and
    `attention_dropout` are the sequence model's, as in `SASRecConfig`.

    Args:
        num_layers: a, the top layers of the language model whose states are adapted; all of them where it has fewer.
        adapter_size: Bottleneck width of an adapter.
        adapter_dropout: Probability in training, within the adapters' bottlenecks.
        pooling: What stands for an item in a layer: the state of its text's `last` token, or the `mean` over all.
        item_chunk_size: Items adapted at once; a catalog of more is adapted in pieces that are computed again in the
            backward pass, so that memory does not grow with the catalog.
        state_size: D, the language model's width; taken from the cached states.
        seed: Of the initial weights, and of the training in `fit_ssna`.
        states: Which model, template and layers the states came from; taken from the cached states.
        arguments: See `SASRecConfig`.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    model_type = "ssna"

    def __init__(
        self,
        num_layers: int = 4,
        adapter_size: int = 64,
        adapter_dropout: float = 0.1,
        pooling: str = "last",
        item_chunk_size: int = 2048,
        state_size: int = 1,
        seed: int = 0,
        states: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.num_layers = num_layers
        self.adapter_size = adapter_size
        self.adapter_dropout = adapter_dropout
        self.pooling = pooling
        self.item_chunk_size = item_chunk_size
        self.state_size = state_size
        self.seed = seed
        self.states = states or {}
        for name in ("num_layers", "adapter_size", "item_chunk_size", "state_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 <= adapter_dropout < 1:
            raise ConfigurationError(f"adapter_dropout must be in [0, 1), got {adapter_dropout!r}")
        if pooling not in POOLINGS:
            raise ConfigurationError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        super().__init__(**arguments)
