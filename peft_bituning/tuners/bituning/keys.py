"""The names of an adapter's tensors in files and in the model."""

from collections.abc import Mapping

from torch import Tensor

from ...errors import AdapterLoadError
from .layer import LAYER_NAME, VirtualTokens

SHOWN = 5


def without_adapter_name(key: str, adapter_name: str) -> str | None:
    """Turn a tensor's name in the model into its name in a file, which does not depend on the adapter's name.

    `...virtual_tokens.bituning_prefix.NAME.router.weight` becomes `...virtual_tokens.bituning_prefix.router.weight`.

    Args:
        key: the name in the model.
        adapter_name: NAME.

    Returns:
        The name in a file, or None for a tensor that is not this adapter's.
    """
    for part in VirtualTokens.adapter_layer_names:
        head, found, tail = key.partition(f"{LAYER_NAME}.{part}.{adapter_name}")
        if found and (not tail or tail.startswith(".")):
            return f"{head}{LAYER_NAME}.{part}{tail}"
    return None


def check_fit(adapter_name: str, loaded: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Check that a file holds the adapter's tensors, all and no others; PEFT would load with `strict=False`.

    Args:
        adapter_name: the adapter's name.
        loaded: the file's tensors under their names in the model.
        model: the model's tensors.

    Raises:
        AdapterLoadError: tensors are missing, unexpected, or of another shape.
    """
    own = [key for key in model if without_adapter_name(key, adapter_name) is not None]
    wrong = [
        f"{key}: file {list(value.shape)}, model {list(model[key].shape)}"
        for key, value in sorted(loaded.items())
        if key in model and value.shape != model[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys[:SHOWN])}{f' and {len(keys) - SHOWN} more' if len(keys) > SHOWN else ''}"
        for title, keys in (
            ("missing", sorted(set(own) - set(loaded))),
            ("unexpected", sorted(set(loaded) - set(model))),
            ("of another shape", wrong),
        )
        if keys
    ]
    if problems:
        raise AdapterLoadError(
            f"the saved tensors do not fit the adapter {adapter_name!r} ({len(own)} tensors expected, {len(loaded)} in "
            f"the file); {'; '.join(problems)}. The file is from another configuration, another base model (token "
            "width), or damaged; save it again or load it with the model it was made for"
        )
