"""Making of item tables: in memory, or for a large catalog in a block file that a killed run goes on with."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..artifacts import sha256_of_json
from ..block_file import BlockFile
from ..errors import ArtifactError, ConfigurationError
from ..launch import gathered, processes
from ..tuners.bituning import EmbeddingCenter
from .encoder import HistoryEncoder
from .item_table import TENSOR_NAME, TYPES, ItemTable

logger = logging.getLogger(__name__)

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
    """Return the block file of an item table, for `encode_items_into`; nothing is written yet.

    The folder will hold `item_table.safetensors` [I, D], which `ItemTable.load` maps once it is finished.

    Args:
        folder: Made where it is missing; all processes must see the same one.
        num_items: I.
        identity: What the rows depend on (hashes of weights, catalog, template), as JSON values: a folder of another
            identity is refused.
        block_size: Items per block, which is all that is lost in a kill. A table keeps the one it began with.
        dtype: Of the stored rows, float32 or bfloat16.
        first_item: Catalog index of the first row.

    Raises:
        ConfigurationError: A number below its least, a type that is not stored, or an identity that is not JSON.
    """
    if first_item < 0:
        raise ConfigurationError(f"first_item must be >= 0, got {first_item!r}")
    if dtype not in TYPES:
        raise ConfigurationError(f"dtype must be {' or '.join(map(str, TYPES))}, got {dtype!r}")
    origin = {"identity": dict(identity), "first_item": first_item}
    return BlockFile(folder, "item_table", TENSOR_NAME, origin, (num_items,), _name(dtype), block_size)


def encode_items_into(
    encoder: HistoryEncoder, blocks: BlockFile, autocast: torch.dtype | None = None, progress: bool = False
) -> ItemTable:
    """Encode catalog items block by block into a mapped table; what a run before this one finished is kept.

    Where several processes run, all of them must call this: each encodes blocks of its own, all wait, and each maps the
    whole table. A model in shards (FSDP2) is run by all processes on every block.

    Args:
        encoder: Holds the weights.
        blocks: The folder, and which items, as `table_blocks` gives it.
        autocast: Forward passes under `torch.autocast` in this type, which becomes part of the table's identity.
        progress: Show a progress bar of this process's items.

    Raises:
        ArtifactError: The folder holds a table of another identity, size or type.
        InputError: An embedding that is not finite.
    """
    world, rank = processes()
    if autocast is not None:
        identity = {**blocks.origin["identity"], "autocast": _name(autocast)}
        blocks = replace(blocks, origin={**blocks.origin, "identity": identity})
    found = _unless_damaged(blocks.begun())
    file = found or blocks
    whole = gathered([] if found is None else sorted(found.finished(range(file.num_blocks)[rank::world])))
    missing = sorted(set(range(file.num_blocks)).difference(whole))
    logger.info("%d of %d blocks are there, %d are encoded", len(whole), file.num_blocks, len(missing))
    together = hasattr(encoder.model, "unshard")  # FSDP2: a forward pass gathers weights from all processes
    mine = missing if together else missing[rank::world]
    total = sum(len(file.rows(block)) for block in mine)
    with tqdm(total=total, desc="encoding items", unit="row", disable=not progress) as bar:
        encoded = ((block, _encode_block(encoder, file, block, autocast, progress)) for block in mine)
        first = list(islice(encoded, 1))
        widths = gathered([rows.shape[1] for _, rows in first])  # known now, and the file is made
        if found is None:
            file = replace(blocks, shape=(blocks.shape[0], widths[0]))
            if rank == 0:
                file.create()
        gathered([])
        file.check()
        for block, rows in chain(first, encoded):
            if rank == 0 or not together:
                file.write(block, rows, rank)
            bar.update(len(rows))
    gathered([])
    return ItemTable.load(file.path, file.shape[0])


def encode_table(
    encoder: HistoryEncoder,
    num_items: int,
    folder: Path,
    identity: Mapping[str, Any],
    progress: bool = False,
    center: EmbeddingCenter | None = None,
) -> ItemTable:
    """Encode the catalog with the weights at hand; every process must call it, and all get the same table.

    The table depends on `identity`, JSON values. Those of large catalogs go to `folder`, where the last ones stay. The
    model's `center` is moved to the mean of the catalog's unit embeddings; for a large catalog, to that of items spread
    evenly over it, at most as many as are no large one. None moves nothing.
    """
    if num_items <= LARGE_CATALOG:
        embeddings = encoder.encode_items(num_items, distributed=True, progress=progress)
        return ItemTable.from_embeddings(embeddings if center is None else center.move(embeddings))
    if center is not None:
        some = [[index] for index in range(0, num_items, -(-num_items // LARGE_CATALOG))]
        center.move(encoder.encode(some, "item", True, progress, "encoding items for their mean"))
    key = sha256_of_json(dict(identity), sort_keys=True)[:16]
    place = folder / f"table-{key}"
    if processes()[1] == 0:
        others = [each for each in folder.glob("*") if each != place]
        for old in sorted(others, key=lambda each: each.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)  # a table still in use stays mapped
    return encode_items_into(encoder, table_blocks(place, num_items, {"run": key}), progress=progress)


def _encode_block(
    encoder: HistoryEncoder, file: BlockFile, block: int, autocast: torch.dtype | None, progress: bool
) -> Tensor:
    """Encode the items of a block to rows of length 1, in the type of the file."""
    items = [file.origin["first_item"] + row for row in file.rows(block)]
    prompts = encoder.collator.prompts
    anew = encoder.over(prompts.items)  # for every block: it keeps the tokens of each item that it ever saw
    label = f"items {items[0]} to {items[-1]}"
    together = hasattr(encoder.model, "unshard")
    with torch.autocast(encoder.device.type, dtype=autocast, enabled=autocast is not None):
        embeddings = anew.encode([[item] for item in items], "item", together, progress, label)
    for name, count in anew.collator.prompts.counts.items():
        prompts.counts[name] += count
    return ItemTable.from_embeddings(embeddings).embeddings.to(getattr(torch, file.dtype))


def _unless_damaged(file: BlockFile | None) -> BlockFile | None:
    """Return a table's file; None where it is truncated, to be made again."""
    try:
        if file is not None:
            file.check()
    except ArtifactError as error:
        logger.warning("the item table is damaged and is made again: %s", error)
        return None
    return file


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
