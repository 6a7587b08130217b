"""An adapter's file held against the adapter: all of its tensors and no others."""

from collections.abc import Collection, Mapping

from torch import Tensor

from ...errors import AdapterLoadError

SHOWN = 5


def check_fit(
    adapter_name: str, loaded: Mapping[str, Tensor], model: Mapping[str, Tensor], needed: Collection[str]
) -> None:
    """Check that a file holds the adapter's tensors; PEFT would load with `strict=False`.

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
