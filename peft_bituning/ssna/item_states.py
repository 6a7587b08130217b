"""The frozen language model's states of every item: all that the side network ever sees of the model.

Shapes: `I` catalog items, `a` layers, `D` width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..block_file import BlockFile
from ..errors import ArtifactError, InputError

STATES = "states"  # the block file and the tensor in it


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
        file = BlockFile.find(place, STATES, STATES)
        if file is None:
            raise ArtifactError(f"{place.name} holds no cached states; make them with cache_item_states")
        values = file.values()
        left = sorted(set(range(file.num_blocks)) - file.finished(verify=verify))
        if left:
            raise ArtifactError(
                f"{len(left)} of {file.num_blocks} blocks of the cached states in {place.name} are unfinished or "
                f"damaged, first {left[:5]}; call cache_item_states again, it makes these alone"
            )
        return cls(values, file.origin)
