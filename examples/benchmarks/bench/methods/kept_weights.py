"""What a trial keeps for others to start from."""

from dataclasses import dataclass

from peft_bituning.artifacts import weights_hash
from peft_bituning.errors import CheckpointError
from peft_bituning.training.stage_result import Weights

_USERS, _ITEMS = "users.", "items."


@dataclass(frozen=True)
class KeptWeights:
    """The trained weights of both sides, as a saved recommender has them.

    Args:
        users: A', which encodes users.
        items: A, which encoded the item table that A' speaks to.
    """

    users: Weights
    items: Weights

    def to_tensors(self) -> Weights:
        """Return everything as tensors for one file."""
        named = {f"{_USERS}{name}": value for name, value in self.users.items()}
        named |= {f"{_ITEMS}{name}": value for name, value in self.items.items()}
        return {name: value.contiguous() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Weights) -> "KeptWeights":
        """Take apart what `to_tensors` returned.

        Args:
            tensors: of one file.

        Raises:
            CheckpointError: one of the sides is not there.
        """
        sides = [
            {name.removeprefix(side): value for name, value in tensors.items() if name.startswith(side)}
            for side in (_USERS, _ITEMS)
        ]
        if not all(sides):
            raise CheckpointError("kept weights must be of users and of items, got one side; train them again")
        return cls(*sides)

    def content_hash(self) -> str:
        """Return the sha256 (hex) over names and values."""
        return weights_hash(self.to_tensors())
