"""The frozen language model's states of every item: all that the side network ever sees of the model.

Shapes: `I` catalog items, `a` layers, `D` width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArtifactError, InputError
from .states_file import StatesFile


@dataclass(frozen=True, eq=False)
class ItemStates:
    """One vector an item and layer, layers from the lowest cached one to the top.

    Args:
        values: `[I, a, D]`, any float type; from `open` it is mapped into memory, not read into it.
        origin: What made the states: base model, template, pooling, items.

    Raises:
        InputError: The shape is not `[I, a, D]`, or the type is no float.
    """

    values: Tensor
    origin: dict[str, Any]

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or 0 in self.values.shape:
            raise InputError(f"states must have shape [items, layers, width], got {list(self.values.shape)}")
        if not self.values.dtype.is_floating_point:
            raise InputError(f"states must be of a float type, got {self.values.dtype}")

    def __len__(self) -> int:
        """Return I."""
        return self.values.shape[0]

    @property
    def num_layers(self) -> int:
        """The number of layers, a."""
        return self.values.shape[1]

    @property
    def width(self) -> int:
        """The width of the language model, D."""
        return self.values.shape[2]

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "ItemStates":
        """Open states that `cache_item_states` finished; the language model is not needed.

        Args:
            folder: Where they were cached.
            verify: Read the file once and compare it with the checksums of its blocks.

        Returns:
            The states, memory-mapped.

        Raises:
            ArtifactError: There are none, they are not finished, or blocks are damaged.
        """
        place = Path(folder)
        file = StatesFile.find(place)
        if file is None:
            raise ArtifactError(f"{place.name} holds no cached states; make them with cache_item_states")
        left = sorted(set(range(file.num_blocks)) - file.finished(verify))
        if left:
            raise ArtifactError(
                f"{len(left)} of {file.num_blocks} blocks of the cached states in {place.name} are unfinished or "
                f"damaged, first {left[:5]}; call cache_item_states again, it makes these alone"
            )
        return cls(file.values(), file.origin)


def differences(saved: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two origins, for messages.

    Args:
        saved: JSON values of the one.
        found: Those of the other.
        prefix: Path to both.

    Returns:
        One `path was this and is that` for each value that differs.
    """
    different: list[str] = []
    for key in sorted({*saved, *found}):
        before, now = saved.get(key), found.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            different.extend(differences(before, now, f"{prefix}{key}."))
        elif before != now:
            different.append(f"{prefix}{key} was {before!r} and is {now!r}")
    return different
