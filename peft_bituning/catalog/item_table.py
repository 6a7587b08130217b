"""The item table: one embedding an item, encoded with one set of weights and kept while users are trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..artifacts import bytes_of, sha256_of, whole_file
from ..errors import ArtifactError, InputError

TENSOR_NAME = "embeddings"
TYPES = (torch.float32, torch.bfloat16)
CHUNK_BYTES = 4 << 20


def chunks(rows: Tensor) -> Iterator[Tensor]:
    """Cut rows [I, D] into views of at most 4 MiB, in order, so that memory need not hold a second table."""
    row_bytes = max(1, rows[:1].numel() * rows.element_size())
    yield from rows.split(max(1, CHUNK_BYTES // row_bytes))


def non_finite_rows(rows: Tensor, limit: int = 10) -> list[int]:
    """Return the first rows of [I, D] that hold NaN or infinity, so many at most."""
    found: list[int] = []
    first = 0
    for chunk in chunks(rows):
        bad = torch.nonzero(~torch.isfinite(chunk).all(1)).flatten()
        found.extend((bad + first).tolist())
        if len(found) >= limit:
            break
        first += len(chunk)
    return found[:limit]


@dataclass(frozen=True)
class ItemTable:
    """Unit-length item embeddings [I, D] float32 in catalog order.

    Rounded to bfloat16, lengths differ from 1 by up to 0.4 %, and cosines by as much.
    """

    embeddings: Tensor

    @classmethod
    def from_embeddings(cls, embeddings: Tensor) -> "ItemTable":
        """Normalise item embeddings [I, D] once, so that a dot product with a unit vector is a cosine.

        Raises:
            InputError: Not [I, D], or a row that is not finite.
        """
        if embeddings.ndim != 2:
            raise InputError(f"item embeddings must be [I, D], got {list(embeddings.shape)}")
        if rows := non_finite_rows(embeddings):
            raise InputError(f"item embeddings must be finite, got NaN or infinity at catalog indices {rows}")
        return cls(F.normalize(embeddings.float(), dim=-1))

    def __len__(self) -> int:
        """Return I."""
        return self.embeddings.shape[0]

    def scores(self, users: Tensor) -> Tensor:
        """Return the cosine of every user with every item (paper Eq. 3), [B, I] float32, of users [B, D]."""
        users = F.normalize(users.float(), dim=-1)
        if self.embeddings.dtype == torch.float32:
            return users @ self.embeddings.to(users.device).T
        scores = users.new_empty(len(users), len(self))
        first = 0
        for rows in chunks(self.embeddings):
            scores[:, first : first + len(rows)] = users @ rows.to(users.device).float().T
            first += len(rows)
        return scores

    def extended(self, embeddings: Tensor) -> "ItemTable":
        """Return the table with more items [J, D], of any length, at its end; its type stays.

        Raises:
            InputError: Another width, or a row that is not finite.
        """
        new = self.from_embeddings(embeddings).embeddings.to(self.embeddings)
        if new.shape[1] != self.embeddings.shape[1]:
            raise InputError(
                f"item embeddings must be [J, D] with D = {self.embeddings.shape[1]}, got {list(new.shape)}"
            )
        return ItemTable(torch.cat([self.embeddings, new]))

    def to(self, device: torch.device | str) -> "ItemTable":
        """Return the table on another device."""
        return ItemTable(self.embeddings.to(device))

    def checksum(self) -> str:
        """Return the sha256 of the table's bytes."""
        return sha256_of(map(bytes_of, chunks(self.embeddings)))

    def save(self, path: Path) -> None:
        """Write the table as safetensors, whole or not at all; `path` may be the file that it is mapped from."""
        with whole_file(path) as temporary:
            save_file({TENSOR_NAME: self.embeddings.detach().cpu().contiguous()}, temporary)

    @classmethod
    def load(cls, path: Path, num_items: int | None = None) -> "ItemTable":
        """Map a table that `save` wrote: its rows stay in the file, the system reads them in as they are used.

        Raises:
            ArtifactError: The file is missing or damaged, or its tensor has another name, type or number of items than
                `num_items`, or holds a row that is not finite.
        """
        try:
            tensors = load_file(path)  # maps the file
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"the item table {path.name} cannot be read ({error}); it is missing or damaged, download or "
                "save the folder again"
            ) from error
        rows = tensors.get(TENSOR_NAME, torch.empty(0))
        if set(tensors) != {TENSOR_NAME}:
            rule = f"hold one tensor `embeddings`, got {', '.join(sorted(tensors))}; save the folder again"
        elif rows.ndim != 2 or rows.dtype not in TYPES:
            types = " or ".join(map(str, TYPES))
            rule = f"be [I, D] {types}, got {list(rows.shape)} {rows.dtype}; save the folder again"
        elif num_items not in (None, len(rows)):
            two_saves = "catalog and table are from two saves, save or download the folder again"
            rule = f"have {num_items} rows, one an item, got {len(rows)}; {two_saves}"
        elif non_finite_rows(rows):
            rule = "be finite, got NaN or infinity; it is unfinished or overflowed, encode it again"
        else:
            return cls(rows)
        raise ArtifactError(f"the item table {path.name} must {rule}")
