"""The one tuner layer of a Bi-Tuning model: every adapter's prefix encoder and suffix."""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import ConfigurationError, UnsupportedOperationError
from ..rows.backbone import move_beside
from ..rows.center import EmbeddingCenter
from .encoders import PrefixEncoder

LAYER_NAME = "virtual_tokens"
NO_MERGING = (
    "virtual tokens cannot be merged into the base model, they are inputs and not weights; keep the adapter beside the "
    "model"
)


class AdapterDict(nn.ModuleDict):
    """A `ModuleDict` that takes any adapter name, such as `items`, which `nn.ModuleDict` has as a method."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add an entry under a name, whatever attributes the class has."""
        if not name or "." in name:
            raise ConfigurationError(f"an adapter's name must be non-empty and without dots, got {name!r}")
        self._modules[name] = module  # type: ignore[assignment]


class VirtualTokens(nn.Module, BaseTunerLayer):
    """Holds, for each adapter, a prefix encoder, under suffix pooling the suffix [1, D] (paper Eq. 1), and a center.

    Args:
        embeddings: the model's token embeddings, whose device the virtual tokens share.
    """

    adapter_layer_names = ("bituning_prefix", "bituning_suffix", "bituning_center")

    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__()
        self._embeddings = [embeddings]  # in a list: to know its device, not to own it
        self.bituning_prefix = AdapterDict()
        self.bituning_suffix = AdapterDict()
        self.bituning_center = AdapterDict()

    def add(
        self, name: str, encoder: PrefixEncoder, suffix: nn.Embedding | None, center: EmbeddingCenter | None
    ) -> None:
        """Add an adapter.

        Args:
            name: the adapter's name.
            encoder: its prefix encoder.
            suffix: its suffix, an embedding of one token [1, D], or None where the pooling has none.
            center: what its embeddings are centered by, or None.
        """
        self.bituning_prefix[name] = encoder
        if suffix is not None:
            self.bituning_suffix[name] = suffix
        if center is not None:
            self.bituning_center[name] = center

    def check_name(self, name: str, encoder: PrefixEncoder) -> None:
        """Refuse adapter names that PEFT would confuse with a part of a parameter's name.

        On saving, PEFT leaves out every key that has another adapter's name in it: a static adapter `router` would
        cut the router out of the files of an M-Former beside it.

        Args:
            name: the new adapter's name.
            encoder: its prefix encoder.

        Raises:
            ConfigurationError: a name, the new one or one that is there, is a part of a parameter's name.
        """
        encoders = [encoder, *self.bituning_prefix.values()]
        parts = {part for each in encoders for key in each.state_dict() for part in key.split(".")}
        parts.update(self.adapter_layer_names, ("base_model", "model", LAYER_NAME, "weight"))
        confused = parts & {name, *self.bituning_prefix.keys()}
        if confused:
            raise ConfigurationError(
                f"the adapter's name must not be part of a parameter's name, got {min(confused)!r}; choose another"
            )

    def encoder(self, name: str) -> PrefixEncoder:
        """Return the prefix encoder of an adapter."""
        encoder = self.bituning_prefix[name]
        if not isinstance(encoder, PrefixEncoder):
            raise TypeError(f"the prefix of adapter {name!r} must be a PrefixEncoder, got {type(encoder).__name__}")
        return encoder

    def suffix(self, name: str) -> torch.Tensor | None:
        """Return the suffix [1, D] of an adapter, or None."""
        if name not in self.bituning_suffix:
            return None
        suffix = self.bituning_suffix[name]
        return suffix(torch.zeros(1, dtype=torch.long, device=next(suffix.parameters()).device))

    def center(self, name: str) -> EmbeddingCenter | None:
        """Return what an adapter's embeddings are centered by, or None."""
        if name not in self.bituning_center:
            return None
        return cast(EmbeddingCenter, self.bituning_center[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: virtual tokens are inputs, there is no weight to merge them into."""
        raise UnsupportedOperationError(NO_MERGING)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Move an adapter beside the token embeddings; PEFT's own version looks for a `base_layer` for ever."""
        parts = [getattr(self, name) for name in self.adapter_layer_names]
        move_beside(self._embeddings[0], [part[adapter_name] for part in parts if adapter_name in part], device)
