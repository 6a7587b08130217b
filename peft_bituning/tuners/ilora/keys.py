"""The names of an adapter's tensors in files and in the model."""

from collections.abc import Iterable, Mapping

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ...errors import AdapterLoadError
from .layer import InstanceGates

SHOWN = 5
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


def check_tensors(adapter_name: str, loaded: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that a file holds the adapter's tensors, all and no others; PEFT would load with `strict=False`.

    Args:
        adapter_name: the adapter's name.
        loaded: the file's tensors under their names in the model.
        model: the model that holds the adapter.

    Raises:
        AdapterLoadError: tensors are missing, unexpected, or of another shape.
    """
    needed, tensors = set(adapter_keys(model, adapter_name)), model.state_dict()
    found = {
        "missing": sorted(needed - set(loaded)),
        "unexpected": sorted(set(loaded) - set(tensors)),
        "of another shape": [
            f"{key}: file {list(value.shape)}, model {list(tensors[key].shape)}"
            for key, value in sorted(loaded.items())
            if key in tensors and value.shape != tensors[key].shape
        ],
    }
    problems = [
        f"{title}: {', '.join(keys[:SHOWN])}{f' and {len(keys) - SHOWN} more' if len(keys) > SHOWN else ''}"
        for title, keys in found.items()
        if keys
    ]
    if problems:
        raise AdapterLoadError(
            f"the saved tensors do not fit the adapter {adapter_name!r} ({len(needed)} tensors expected, {len(loaded)} "
            f"in the file); {'; '.join(problems)}. The file is from another configuration, another base model "
            "(its width or its layers), or damaged; save it again or load it with the model it was made for"
        )
