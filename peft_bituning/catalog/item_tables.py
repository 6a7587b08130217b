"""The item tables of a run: in memory, or for a large catalog in blocks that a killed run goes on with."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..artifacts import sha256_of_json
from ..tuners.bituning import EmbeddingCenter
from .encoder import HistoryEncoder
from .item_table import ItemTable
from .table_blocks import TableBlocks

TABLES = "tables"  # folder beside the checkpoints
LARGE_CATALOG = 16_384  # items; above it a table is encoded block by block, and mapped
KEPT = 2  # tables beside the one being made: a resumed run comes by those of its baselines again


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
    return encoder.encode_items_into(TableBlocks(place, num_items, {"run": key}), progress=progress)
