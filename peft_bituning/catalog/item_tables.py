"""Where item tables are made: in memory, or for a large catalog in a block file that a killed run goes on with."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..artifacts import sha256_of_json
from ..block_file import BlockFile
from ..errors import ConfigurationError
from ..tuners.bituning import EmbeddingCenter
from .encoder import HistoryEncoder
from .item_table import TENSOR_NAME, TYPES, ItemTable

TABLES = "tables"  # folder beside the checkpoints
LARGE_CATALOG = 16_384  # items; above it a table is encoded block by block, and mapped
KEPT = 2  # tables beside the one being made: a resumed run comes by those of its baselines again


def table_blocks(
    folder: Path,
    num_items: int,
    identity: Mapping[str, Any],
    block_size: int = 16_384,
    dtype: torch.dtype = torch.float32,
    first_item: int = 0,
) -> BlockFile:
    """Return the block file of an item table, for `HistoryEncoder.encode_items_into`; nothing is written yet.

    The folder will hold `item_table.safetensors` [I, D], which `ItemTable.load` maps once it is finished.

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
    if first_item < 0:
        raise ConfigurationError(f"first_item must be >= 0, got {first_item!r}")
    if dtype not in TYPES:
        raise ConfigurationError(f"dtype must be {' or '.join(map(str, TYPES))}, got {dtype!r}")
    origin = {"identity": dict(identity), "first_item": first_item}
    name = str(dtype).removeprefix("torch.")
    return BlockFile(folder, "item_table", TENSOR_NAME, origin, (num_items,), name, block_size)


def encode_table(
    encoder: HistoryEncoder,
    num_items: int,
    folder: Path,
    identity: Mapping[str, Any],
    progress: bool = False,
    center: EmbeddingCenter | None = None,
) -> ItemTable:
    """Encode the catalog with the weights at hand; every process must call it.

    Args:
        encoder: holds the weights.
        num_items: I.
        folder: where tables of large catalogs go; the last ones made there stay.
        identity: what the table depends on, as JSON values.
        progress: show a progress bar.
        center: the model's, moved to the mean of the catalog's unit embeddings; for a large catalog, to that of
            items spread evenly over it, at most as many as are no large one. None moves nothing.

    Returns:
        The table, the same on every process.
    """
    if num_items <= LARGE_CATALOG:
        embeddings = encoder.encode_items(num_items, distributed=True, progress=progress)
        return ItemTable.from_embeddings(embeddings if center is None else center.move(embeddings))
    if center is not None:
        some = [[index] for index in range(0, num_items, -(-num_items // LARGE_CATALOG))]
        center.move(encoder.encode(some, "item", True, progress, "encoding items for their mean"))
    key = sha256_of_json(dict(identity), sort_keys=True)[:16]
    place = folder / f"table-{key}"
    if PartialState().is_main_process:
        others = [each for each in folder.glob("*") if each != place]
        for old in sorted(others, key=lambda each: each.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)  # a table still in use stays mapped
    return encoder.encode_items_into(table_blocks(place, num_items, {"run": key}), progress=progress)
