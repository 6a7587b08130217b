"""The layer of a Bi-Tuning model: every adapter's prefix encoder, suffix and center."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..adapter_layer import AdapterDict, AdapterLayer, refuse_parts
from ..rows.center import EmbeddingCenter
from .encoders import PrefixEncoder


class VirtualTokens(AdapterLayer):
    """Holds, for each adapter, a prefix encoder, under suffix pooling the suffix [1, D] (paper Eq. 1), and a center."""

    layer_name = "virtual_tokens"
    adapter_layer_names = ("bituning_prefix", "bituning_suffix", "bituning_center")
    bituning_prefix: AdapterDict
    bituning_suffix: AdapterDict
    bituning_center: AdapterDict
    no_merging = (
        "virtual tokens cannot be merged into the base model, they are inputs and not weights; keep the adapter beside "
        "the model"
    )

    def check_name(self, name: str, model: PreTrainedModel, part: nn.Module) -> None:
        """Refuse names that are, or that make another adapter's name, a part of a parameter's name."""
        encoders = [part, *self.bituning_prefix.values()]
        parts = {each for encoder in encoders for key in encoder.state_dict() for each in key.split(".")}
        refuse_parts([name, *self.adapters], {*parts, *self.adapter_layer_names, self.layer_name})

    def encoder(self, name: str) -> PrefixEncoder:
        """Return the prefix encoder of an adapter."""
        return cast(PrefixEncoder, self.bituning_prefix[name])

    def center(self, name: str) -> EmbeddingCenter | None:
        """Return what an adapter's embeddings are centered by, or None."""
        return cast(EmbeddingCenter, self.bituning_center[name]) if name in self.bituning_center else None
