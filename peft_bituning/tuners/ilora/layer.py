"""The model-level tuner layer of an iLoRA model: every adapter's gate and suffix; PEFT's LoRA layers hold the rest."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, UnsupportedOperationError
from ..rows.backbone import find_backbone, move_beside
from .gate import InstanceGate
from .row_gates import RowGates
from .variant import NO_MERGING

LAYER_NAME = "instance_gates"
LORA_PARTS = ("lora_A", "lora_B", "base_layer", "lora_dropout", "lora_magnitude_vector")


class InstanceGates(nn.Module, BaseTunerLayer):
    """Holds, for each adapter, a gate and, under suffix pooling, the suffix [1, D].

    Args:
        embeddings: the model's token embeddings, whose device gates and suffixes share.
    """

    adapter_layer_names = ("ilora_gate", "ilora_suffix")

    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__()
        self._embeddings = [embeddings]  # in a list: to know its device, not to own it
        self.row_gates = RowGates()
        self.ilora_gate = nn.ModuleDict()
        self.ilora_suffix = nn.ModuleDict()

    def add(self, name: str, gate: InstanceGate, suffix: nn.Embedding | None) -> None:
        """Add an adapter.

        Args:
            name: the adapter's name.
            gate: its gate.
            suffix: its suffix, an embedding of one token [1, D], or None where the pooling has none.
        """
        self.ilora_gate[name] = gate
        if suffix is not None:
            self.ilora_suffix[name] = suffix

    def gate(self, name: str) -> InstanceGate:
        """Return the gate of an adapter."""
        gate = self.ilora_gate[name]
        if not isinstance(gate, InstanceGate):
            raise TypeError(f"the gate of adapter {name!r} must be an InstanceGate, got {type(gate).__name__}")
        return gate

    def suffix(self, name: str) -> torch.Tensor | None:
        """Return the suffix [1, 1, D] of an adapter, or None."""
        if name not in self.ilora_suffix:
            return None
        suffix = self.ilora_suffix[name]
        return suffix(torch.zeros(1, 1, dtype=torch.long, device=next(suffix.parameters()).device))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the weights of the experts differ by row."""
        raise UnsupportedOperationError(NO_MERGING)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Move an adapter beside the token embeddings; PEFT's own version looks for a `base_layer` for ever."""
        parts = [getattr(self, name) for name in self.adapter_layer_names]
        move_beside(self._embeddings[0], [part[adapter_name] for part in parts if adapter_name in part], device)


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse adapter names that PEFT cannot keep apart from other names.

    Args:
        name: the new adapter's name.
        model: the language model; PEFT cuts every key with another adapter's name in it out of a file.

    Raises:
        ConfigurationError: the name is one of `nn.ModuleDict`, in which PEFT keeps LoRA's weights, has a dot, or
            is a part of a parameter's name.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ConfigurationError(
            f"an iLoRA adapter's name must be non-empty, without dots and no name of nn.ModuleDict, got {name!r}; "
            f"choose another, such as {name.replace('.', '_') + '_adapter'!r}"
        )
    parts = {*InstanceGates.adapter_layer_names, *LORA_PARTS, "base_model", "model", LAYER_NAME, "weight", "null"}
    parts.update(part for key, _ in model.named_parameters() for part in _without_adapters(key).split("."))
    if name in parts:
        raise ConfigurationError(
            f"the adapter's name must not be part of a parameter's name, got {name!r}; choose another"
        )


def without_head(target_modules: Any, model: PreTrainedModel) -> Any:
    """Name target modules as in the headless model: PEFT goes by the end of names, so they fit a model with a head too.

    Args:
        target_modules: names, as a set or a regular expression.
        model: the language model.

    Returns:
        The names without that of the backbone before them; as they are where shorter ones would fit more modules, and
        a regular expression as it is.
    """
    backbone, names = find_backbone(model), dict(model.named_modules())
    prefix = next(f"{name}." for name, module in names.items() if module is backbone)
    if isinstance(target_modules, str) or backbone is model:
        return target_modules
    shorter = {name.removeprefix(prefix) for name in target_modules}
    ends = tuple(f".{name}" for name in shorter - set(target_modules))
    if any(f".{name}".endswith(ends) for name in names if not name.startswith(prefix)):
        return target_modules
    return shorter


def _without_adapters(key: str) -> str:
    """Cut what an adapter has added to a parameter's name: `q_proj.lora_A.NAME.weight` -> `q_proj`."""
    parts = key.split(".")
    added = (*InstanceGates.adapter_layer_names, *LORA_PARTS, "modules_to_save")
    return ".".join(parts[: min((parts.index(part) for part in added if part in parts), default=len(parts))])
