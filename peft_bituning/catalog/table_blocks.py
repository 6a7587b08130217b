"""An item table on its way to disk, block by block, for catalogs of any size."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..block_file import BlockFile
from ..errors import ArtifactError, ConfigurationError
from .item_table import TENSOR_NAME, TYPES, ItemTable

logger = logging.getLogger(__name__)

NAME = "item_table"
TABLE_FILE = f"{NAME}.safetensors"


@dataclass(frozen=True)
class TableBlocks:
    """A folder in which an item table is made, as a block file: `item_table.safetensors` [I, D] and what it is of.

    Args:
        folder: made where it is missing; all processes must see the same one.
        num_items: I.
        identity: what the rows depend on (hashes of weights, catalog, template), as JSON values: a folder of another
            identity is refused.
        block_size: items of a block; all that is lost in a kill, and how long the last process may be waited for. A
            table that is gone on with keeps the one it began with.
        dtype: of the stored rows, float32 or bfloat16.
        first_item: catalog index of the first row.

    Raises:
        ConfigurationError: a number below its least, a type that is not stored, or an identity that is not JSON.
    """

    folder: Path
    num_items: int
    identity: Mapping[str, Any]
    block_size: int = 16_384
    dtype: torch.dtype = torch.float32
    first_item: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_items", 1), ("block_size", 1), ("first_item", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} must be >= {least}, got {getattr(self, name)!r}")
        if self.dtype not in TYPES:
            raise ConfigurationError(f"dtype must be {' or '.join(map(str, TYPES))}, got {self.dtype!r}")
        try:
            json.dumps(dict(self.identity))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"identity must be a mapping of JSON values, got {self.identity!r} ({error}); write hashes as strings"
            ) from error

    def identified(self, **more: Any) -> "TableBlocks":
        """Return the same table with more in its identity."""
        return replace(self, identity={**self.identity, **more})

    def of_width(self, width: int) -> BlockFile:
        """Return the block file of a table of width D; nothing is read or written."""
        return BlockFile(
            self.folder,
            NAME,
            TENSOR_NAME,
            {"identity": dict(self.identity), "first_item": self.first_item},
            (self.num_items, width),
            str(self.dtype).removeprefix("torch."),
            self.block_size,
        )

    def items_of(self, file: BlockFile, block: int) -> range:
        """Return the catalog indices of a block of this table's file."""
        rows = file.items_of(block)
        return range(self.first_item + rows.start, self.first_item + rows.stop)

    def find(self) -> BlockFile | None:
        """Look for what an earlier run left; nothing in the folder is changed.

        Returns:
            The file; None where there is none, or a truncated one, which is to be made again.

        Raises:
            ArtifactError: the folder holds a table of another identity, size or type, or one that nothing describes.
        """
        found = BlockFile.find(self.folder, NAME, TENSOR_NAME)
        if found is None:
            if (self.folder / TABLE_FILE).exists():
                raise ArtifactError(
                    f"{self.folder} holds {TABLE_FILE} but nothing that says what it is of, so it was not made here; "
                    "give a folder of its own"
                )
            return None
        different = found.changes(self.of_width(found.shape[-1]))
        if different:
            raise ArtifactError(
                f"{self.folder} is of another table: {'; '.join(different)}; give another folder, or remove this one"
            )
        if not found.path.exists():  # a kill came before it was made
            return None
        try:
            found.check()
        except ArtifactError as error:
            logger.warning("%s is damaged and is made again: %s", TABLE_FILE, error)
            return None
        return found

    def write(self, file: BlockFile, block: int, embeddings: Tensor, writer: int | None = None) -> None:
        """Write the rows of a block at length 1, in the type of the table.

        Args:
            file: this table's.
            block: its number.
            embeddings: [items of the block, D], of any length.
            writer: number of this process where several write.

        Raises:
            InputError: another number of rows, or a row that is not finite.
            ArtifactError: rows of another width than the table.
        """
        rows = ItemTable.from_embeddings(embeddings).embeddings.to(self.dtype)
        if rows.shape[1] != file.shape[1]:
            raise ArtifactError(
                f"{TABLE_FILE} must be of width {rows.shape[1]}, got {file.shape[1]} from an earlier run; the identity "
                "must tell models apart: remove the folder and encode again"
            )
        file.write(block, rows, writer)
