"""An adapter's file: the names of its tensors there and in the model, and a check that all and no others are there."""

import re
from collections.abc import Collection, Iterable, Mapping

from peft import PeftModel
from torch import Tensor, nn

from ..errors import AdapterLoadError

ROOT = "base_model.model."  # where a `PeftModel` keeps the language model
SHOWN = 5


def without_adapter_name(key: str, parts: Iterable[str], adapter_name: str) -> str | None:
    """Turn a tensor's name in the model into its name in a file; None for a tensor that is not this adapter's.

    `...virtual_tokens.bituning_prefix.NAME.router.weight` becomes `...virtual_tokens.bituning_prefix.router.weight`,
    where `bituning_prefix` is one of the parts that a tuner's layers keep by adapter.
    """
    name = rf"\.({'|'.join(parts)})\.{re.escape(adapter_name)}(?=\.|$)"
    short, found = re.subn(name, r".\1", key, count=1)
    return short if found else None


def adapter_keys(names: Iterable[str], parts: Collection[str], adapter_name: str) -> list[str]:
    """List those of the model's tensors that are an adapter's, see `without_adapter_name`."""
    return [key for key in names if without_adapter_name(key, parts, adapter_name) is not None]


def under_this_base(model: nn.Module, loaded: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Rename a file's tensors that come from a base model with a head for one without, and the other way round.

    Args:
        model: the model that holds the adapter.
        loaded: the file's tensors.
        own: the names that the adapter's tensors have in files of this model; only tensors that get one are renamed.
    """
    known = set(own)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = f"{ROOT}{getattr(base, 'base_model_prefix', '')}."

    def rename(key: str) -> str:
        other = key.replace(inner, ROOT, 1) if key.startswith(inner) else key.replace(ROOT, inner, 1)
        return other if key not in known and other in known else key

    return {rename(key): value for key, value in loaded.items()}


def check_fit(
    adapter_name: str, loaded: Mapping[str, Tensor], model: Mapping[str, Tensor], needed: Collection[str]
) -> None:
    """Check that a file holds an adapter's tensors and no others; PEFT would load with `strict=False`.

    Args:
        adapter_name: the adapter's name.
        loaded: the file's tensors under their names in the model.
        model: the model's tensors.
        needed: names of those that are the adapter's.

    Raises:
        AdapterLoadError: tensors are missing, unexpected, or of another shape.
    """
    found = {
        "missing": sorted(set(needed) - set(loaded)),
        "unexpected": sorted(set(loaded) - set(model)),
        "of another shape": [
            f"{key}: file {list(value.shape)}, model {list(model[key].shape)}"
            for key, value in sorted(loaded.items())
            if key in model and value.shape != model[key].shape
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
            f"in the file); {'; '.join(problems)}. The file is from another configuration, another base model (token "
            "width, layers), or damaged; save it again or load it with the model it was made for"
        )
