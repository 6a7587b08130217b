"""The model-level tuner layer of an iLoRA model: every adapter's gate and suffix; PEFT's LoRA layers hold the rest."""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError
from ..adapter_layer import AdapterDict, AdapterLayer, refuse_parts
from ..rows.backbone import find_backbone
from .gate import InstanceGate
from .row_gates import RowGates
from .variant import NO_MERGING

LORA_PARTS = ("lora_A", "lora_B", "base_layer", "lora_dropout", "lora_magnitude_vector")


class InstanceGates(AdapterLayer):
    """Holds, for each adapter, a gate and, under suffix pooling, the suffix [1, D]."""

    layer_name = "instance_gates"
    adapter_layer_names = ("ilora_gate", "ilora_suffix")
    ilora_gate: AdapterDict
    ilora_suffix: AdapterDict
    no_merging = NO_MERGING

    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__(embeddings)
        self.row_gates = RowGates()

    def gate(self, name: str) -> InstanceGate:
        """Return the gate of an adapter."""
        return cast(InstanceGate, self.ilora_gate[name])

    def check_name(self, name: str, model: PreTrainedModel, part: nn.Module) -> None:
        """Refuse names of `nn.ModuleDict`, in which PEFT keeps LoRA's weights, and parts of a parameter's name."""
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ConfigurationError(
                f"an iLoRA adapter's name must be non-empty, without dots and no name of nn.ModuleDict, got {name!r}; "
                f"choose another, such as {name.replace('.', '_') + '_adapter'!r}"
            )
        parts = {each for key, _ in model.named_parameters() for each in self._without_adapters(key).split(".")}
        refuse_parts([name], {*parts, *self.adapter_layer_names, *LORA_PARTS, self.layer_name, "null"})

    def _without_adapters(self, key: str) -> str:
        """Cut what an adapter has added to a parameter's name: `q_proj.lora_A.NAME.weight` -> `q_proj`."""
        parts = key.split(".")
        added = (*self.adapter_layer_names, *LORA_PARTS, "modules_to_save")
        return ".".join(parts[: min((parts.index(part) for part in added if part in parts), default=len(parts))])


def without_head(target_modules: Any, model: PreTrainedModel) -> Any:
    """Name target modules as in the headless model: PEFT goes by the end of names, so they fit a model with a head too.

    Names stay as they are where shorter ones would fit more modules, and so does a regular expression.
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
