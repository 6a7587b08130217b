"""The adapter layer: the one module beside the language model's own, with what each adapter adds to it."""

from abc import abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, UnsupportedOperationError
from .rows.backbone import device_of


class AdapterDict(nn.ModuleDict):
    """A `ModuleDict` that takes any adapter name, such as `items`, which `nn.ModuleDict` has as a method."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add an entry under a name, whatever attributes the class has."""
        if not name or "." in name:
            raise ConfigurationError(f"an adapter's name must be non-empty and without dots, got {name!r}")
        self._modules[name] = module  # type: ignore[assignment]


class AdapterLayer(nn.Module, BaseTunerLayer):
    """Holds each adapter's parts, the second of which is the suffix [1, D] of suffix pooling.

    Args:
        embeddings: the model's token embeddings, whose device the parts share.
    """

    layer_name: ClassVar[str]  # under which it stands among the model's own modules
    no_merging: ClassVar[str]  # why it cannot become part of the language model

    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__()
        self._embeddings = [embeddings]  # in a list: to know its device, not to own it
        for kind in self.adapter_layer_names:
            self.add_module(kind, AdapterDict())

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return list(getattr(self, self.adapter_layer_names[0]))

    def add(self, name: str, *parts: nn.Module | None) -> None:
        """Add an adapter's parts in the order of `adapter_layer_names`; it may lack all but the first."""
        for kind, part in zip(self.adapter_layer_names, parts, strict=True):
            if part is not None:
                getattr(self, kind)[name] = part

    def parts(self, name: str) -> list[nn.Module]:
        """Return the parts that an adapter has."""
        kinds = [getattr(self, kind) for kind in self.adapter_layer_names]
        return [kind[name] for kind in kinds if name in kind]

    def suffix(self, name: str) -> Tensor | None:
        """Return the suffix [1, 1, D] of an adapter, or None."""
        suffixes = getattr(self, self.adapter_layer_names[1])
        if name not in suffixes:
            return None
        suffix = suffixes[name]
        return suffix(torch.zeros(1, 1, dtype=torch.long, device=next(suffix.parameters()).device))

    @abstractmethod
    def check_name(self, name: str, model: PreTrainedModel, part: nn.Module) -> None:
        """Refuse names of a new adapter, whose first part is given, that PEFT cannot keep apart from others.

        On saving, PEFT leaves out every key that has another adapter's name in it: an adapter `router` would cut the
        router out of the files of an M-Former beside it.

        Raises:
            ConfigurationError: such a name.
        """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, see `no_merging`."""
        raise UnsupportedOperationError(self.no_merging)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Move an adapter to where the token embeddings compute; PEFT's own looks for a `base_layer` for ever."""
        target = device_of(self._embeddings[0]) if device is None else torch.device(device)
        for tensor in [each for part in self.parts(adapter_name) for each in (*part.parameters(), *part.buffers())]:
            if not (tensor.is_meta or target.type == "meta"):
                tensor.data = tensor.data.to(target)


def refuse_parts(names: Collection[str], parts: Collection[str]) -> None:
    """Refuse adapter names that are parts of parameters' names, see `AdapterLayer.check_name`."""
    confused = {*names} & {*parts, "base_model", "model", "weight"}
    if confused:
        raise ConfigurationError(
            f"the adapter's name must not be part of a parameter's name, got {min(confused)!r}; choose another"
        )
