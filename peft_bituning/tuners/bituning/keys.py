"""The names of an adapter's tensors in files and in the model."""

from collections.abc import Iterable

from .layer import LAYER_NAME, VirtualTokens


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


def adapter_keys(names: Iterable[str], adapter_name: str) -> list[str]:
    """List an adapter's tensors.

    Args:
        names: of the model's tensors.
        adapter_name: the adapter's name.

    Returns:
        Those of its prefix encoder, suffix and center.
    """
    return [key for key in names if without_adapter_name(key, adapter_name) is not None]
