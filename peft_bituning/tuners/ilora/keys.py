"""The names of an adapter's tensors in files and in the model."""

from collections.abc import Iterable, Mapping

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .layer import InstanceGates

ROOT = "base_model.model."


def adapter_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """List the tensors of an adapter: its experts, its gate and its suffix.

    Args:
        model: the model that holds it.
        adapter_name: the adapter's name.

    Returns:
        Their names in the model.
    """
    return [
        f"{name}.{part}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer | InstanceGates)
        for part in layer.adapter_layer_names
        for key in getattr(layer, part).state_dict()
        if key.split(".")[0] == adapter_name
    ]


def under_this_base(model: nn.Module, loaded: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Rename tensors that come from a base model with a head for one without, and the other way round.

    Args:
        model: the model that holds the adapter.
        loaded: the file's tensors.
        own: the names that the adapter's tensors have in files of this model.

    Returns:
        The file's tensors, those that fit under another name renamed.
    """
    known = set(own)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = f"{ROOT}{getattr(base, 'base_model_prefix', '')}."

    def rename(key: str) -> str:
        other = key.replace(inner, ROOT, 1) if key.startswith(inner) else key.replace(ROOT, inner, 1)
        return other if key not in known and other in known else key

    return {rename(key): value for key, value in loaded.items()}
