"""Encoded users: embeddings that were made once, for everything that ranks by them afterwards.

Shapes: `B` rows, `I` catalog items, `D` width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..catalog.item_table import ItemTable
from ..errors import InputError


class EncodedUsers:
    """Embeddings by history, beside the item table that they speak to; what the hybrid's part `laser` reads.

    Args:
        table: the item table.
    """

    def __init__(self, table: ItemTable) -> None:
        self.item_embeddings = table.embeddings
        self._users: dict[tuple[int, ...], Tensor] = {}

    def keep(self, histories: Sequence[Sequence[int]], embeddings: Tensor) -> None:
        """Keep the embeddings `[B, D]`, of any length, of B histories of catalog indices."""
        vectors = F.normalize(embeddings.float().cpu(), dim=1)
        self._users |= {tuple(history): vector for history, vector in zip(histories, vectors, strict=True)}

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Return the kept embeddings `[B, D]` of length 1; a history that was not kept is an InputError."""
        try:
            found = [self._users[tuple(history)] for history in histories]
        except KeyError as error:
            raise InputError(f"histories must be among those that were encoded, got {error.args[0]!r}") from error
        return torch.stack(found) if found else torch.zeros(0, self.item_embeddings.shape[1])
