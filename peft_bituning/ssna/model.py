"""The recommender: side network, sequence model, full softmax over the catalog of I items.

SSNA-style after "Towards Efficient and Effective Adaptation of Large Language Models for Sequential Recommendation"
(arXiv, October 2023), of which we know the abstract alone.
"""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..artifacts import differences
from ..errors import ArtifactError, ConfigurationError, InputError
from ..recommenders.base import evaluation_mode
from ..recommenders.sasrec import SASRec, SASRecConfig
from ..recommenders.transformer import mask_of_lengths
from .item_states import POOLINGS, ItemStates
from .side_network import SideNetwork

# What must agree for states to mean the same in another catalog; the precision of the weights may differ.
_SAME_MEANING = ("fingerprint", "template", "pooling")


class TextSASRec(SASRec):
    """A causal transformer over items known by their text; there is no weight for any single item.

    A subclass gives `embed_items`. An item that was never seen in training has text, hence an embedding.
    """

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        self.encoder.set_input_embeddings(None)  # type: ignore[arg-type]

    def embed_items(self) -> Tensor:
        """Compute the embeddings `[I, C]` of the whole catalog, with gradients where they are enabled."""
        raise NotImplementedError

    @property
    def item_weights(self) -> Tensor:
        """Item embeddings `[I, C]`, input and output alike: frozen, without dropout."""
        with torch.no_grad(), evaluation_mode(self):
            return self.embed_items().detach()

    def _encode_packed(self, item_indices: Tensor, lengths: Tensor) -> Tensor:
        return self._causal_states(item_indices, self.item_weights)

    def _causal_states(self, item_indices: Tensor, item_embeddings: Tensor) -> Tensor:
        """Run histories [B, L] over embeddings [I, C] -> [B, L, C]."""
        inputs = functional.embedding(item_indices, item_embeddings)
        return self.encoder(inputs_embeds=inputs).last_hidden_state

    def training_loss(self, item_indices: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy of the next item over the catalog, averaged over all positions.

        The catalog's embeddings are computed once and have gradients as inputs and as targets. Rows [B, L] begin in
        column 0 and have 2 real items or more; the generator is not used, as every position is a target.
        """
        embeddings = self.embed_items()  # [I, C]
        states = self._causal_states(item_indices[:, :-1], embeddings)  # [B, L-1, C]
        is_target = mask_of_lengths(lengths - 1, states.shape[1])
        logits = states[is_target] @ embeddings.T  # [M, I]
        return functional.cross_entropy(logits, item_indices[:, 1:][is_target])


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


class SSNA(TextSASRec):
    """A sequence model over items embedded by adapters beside a frozen language model.

    Built by `from_states`. Training needs the cached states, scoring does not: the item embeddings are saved with the
    weights, so that a loaded model needs neither the language model nor the cache.

    Args:
        config: Sizes; `num_items`, `state_size` and `num_layers` as in the states.
    """

    config_class = SSNAConfig
    config: SSNAConfig
    recommender_type = "ssna"
    item_table: Tensor

    def __init__(self, config: SSNAConfig) -> None:
        super().__init__(config)
        self.side = SideNetwork(
            config.num_layers, config.state_size, config.adapter_size, config.hidden_size, config.adapter_dropout
        )
        self.register_buffer("item_table", torch.zeros(config.num_items, config.hidden_size))
        self._states: Tensor | None = None
        self._table_weights: list[tuple[int, int]] = []
        self.post_init()

    @classmethod
    def from_states(cls, states: ItemStates, config: SSNAConfig | None = None) -> "SSNA":
        """Build an untrained model over cached states, whose sizes are filled into the config, its weights by its seed.

        Raises:
            ConfigurationError: The states were pooled otherwise.
        """
        settings = (config or SSNAConfig()).to_dict()
        pooling = states.origin.get("pooling", settings["pooling"])
        if pooling != settings["pooling"]:
            raise ConfigurationError(
                f"pooling must be that of the cached states, {pooling!r}, got {settings['pooling']!r}; cache the "
                "states again, or change the config"
            )
        settings |= {
            "num_items": len(states),
            "num_layers": min(settings["num_layers"], states.num_layers),
            "state_size": states.width,
            "states": states.origin,
        }
        full = SSNAConfig.from_dict(settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(full.seed)
            model = cls(full)
            model.side.start(states.values[:, -full.num_layers :], full.item_chunk_size)
        return model.attach(states)

    def attach(self, states: ItemStates) -> "SSNA":
        """Put the model on the states of a catalog, and return it: to train on, or to recommend from another catalog.

        They are of the same language model, template and pooling, and of at least as many layers, the top ones of use.

        Raises:
            ArtifactError: The states mean something else.
            InputError: They have another width or fewer layers.
        """
        saved, found = self.config.states, states.origin
        names = list(_SAME_MEANING)
        if not (saved.get("is_local") or found.get("is_local")):
            names.append("base_model")
        different = differences({name: saved.get(name) for name in names}, {name: found.get(name) for name in names})
        if different:
            raise ArtifactError(
                f"these states are not what this model was trained on: {'; '.join(different)}; cache the catalog with "
                "the same base model, template and pooling"
            )
        if states.width != self.config.state_size or states.num_layers < self.config.num_layers:
            raise InputError(
                f"states must be [items, at least {self.config.num_layers} layers, {self.config.state_size}], got "
                f"{list(states.values.shape)}"
            )
        device = self.item_table.device
        self._states = states.values[:, -self.config.num_layers :]
        self._table_weights = []
        self.config.num_items = len(states)
        self.config.states = states.origin
        self.item_table = torch.zeros(len(states), self.config.hidden_size, device=device)
        self._refresh()
        return self

    def essentials(self) -> dict[str, Any]:
        """Return the settings that decide what the weights compute."""
        names = ("num_layers", "adapter_size", "state_size", "pooling")
        return {**super().essentials(), **{name: getattr(self.config, name) for name in names}}

    @property
    def item_weights(self) -> Tensor:
        """Item embeddings `[I, C]` of the present weights, frozen, without dropout."""
        self._refresh()
        return self.item_table

    def embed_items(self) -> Tensor:
        """Embed the catalog by its states, as `TextSASRec` asks; without them it is an `InputError`."""
        if self._states is None:
            raise InputError(
                "training needs the cached states, which are not saved with the model; attach them with "
                "model.attach(ItemStates.open(folder))"
            )
        self._states = self._states.to(self.item_table.device)  # copied once; on the CPU they stay mapped
        pieces = self._states.split(self.config.item_chunk_size)
        if len(pieces) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._embed(piece) for piece in pieces])
        return torch.cat([checkpoint(self._embed, piece, use_reentrant=False) for piece in pieces])

    def embed(self, states: Tensor) -> Tensor:
        """Embed items `[J, a, D]` that need not be in the catalog, `[J, C]`, without gradient."""
        with torch.no_grad(), evaluation_mode(self):
            return self.side(states.to(self.item_table))

    def content_hash(self) -> str:
        """Return the sha256 (hex) over the essential settings, the weights and the item embeddings."""
        self._refresh()
        return super().content_hash()

    def save_pretrained(self, save_directory: Any, *positional: Any, **arguments: Any) -> Any:
        """Write `config.json` and `model.safetensors`: adapters, sequence model and item embeddings."""
        self._refresh()
        return super().save_pretrained(save_directory, *positional, **arguments)

    def _embed(self, states: Tensor) -> Tensor:
        return self.side(states.to(self.item_table.dtype))  # within the checkpoint, so that no copy outlives its piece

    def _refresh(self) -> None:
        """Compute the item embeddings again where the adapters changed since."""
        weights = [(weight.data_ptr(), weight._version) for weight in self.side.parameters()]
        if self._states is not None and weights != self._table_weights:
            with torch.no_grad(), evaluation_mode(self):
                self.item_table.copy_(self.embed_items())
            self._table_weights = weights
