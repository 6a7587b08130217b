"""Encode a catalog of any size into one mapped table, in as many processes as `accelerate` starts.

    accelerate launch examples/by_feature/encode_catalog.py --model FOLDER --output_dir table

Encodes the catalog of a saved recommender, or with `--items new.jsonl` items that it never saw, and holds the rows of
one block in memory. The same command goes on after a kill. It leaves `item_table.safetensors`, one row of length 1 an
item, and `items.jsonl`, whose lines are the rows. All work is done by `catalog.encode_items_into`.
"""

import argparse
import logging
import sys
from datetime import timedelta
from pathlib import Path

import torch

from peft_bituning import LaserRecommender
from peft_bituning.artifacts import sha256_of_file
from peft_bituning.catalog import encode_items_into, table_blocks
from peft_bituning.data import ItemCatalog
from peft_bituning.data.readers.text_files import json_rows
from peft_bituning.data.rejects import settled_report
from peft_bituning.errors import BiTuningError, ConfigurationError
from peft_bituning.launch import launched_state, use_all_cores
from peft_bituning.serving import hub
from peft_bituning.serving.folder import ITEM_ADAPTER, item_identity


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved LaserRecommender, or its Hub repository")
    add("--output_dir", required=True, type=Path, help="folder of the table")
    add("--items", type=Path, metavar="FILE", help="JSON lines of new items (item_id, title, ...), gzipped or not")
    add("--block_size", type=int, default=16_384, help="items per block, all that a kill can lose (%(default)s)")
    add("--batch_size", type=int, default=32, help="items a forward pass (%(default)s)")
    add("--bf16", action="store_true", help="frozen weights and forward passes in bfloat16")
    add("--store_bf16", action="store_true", help="rows in bfloat16: half the file, cosines to within 0.4 %%")
    add("--base_model", help="the language model, where its recorded name does not resolve here")
    add("--max_rejected", type=float, default=0.05, help="share of bad rows of --items above which it stops")
    add("--disable_tqdm", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


def read_items(path: Path, rejects_path: Path | None, max_rejected: float, progress: bool) -> ItemCatalog:
    """Read new items; bad rows are counted and listed, and too many of them stop the run."""
    with settled_report(rejects_path, max_rejected) as report:
        return ItemCatalog.from_rows(json_rows(path, report, progress=progress), report)


def main(argv: list[str]) -> None:
    """Run the whole job."""
    arguments = parse_arguments(argv)
    state = launched_state(timeout=timedelta(days=1))  # one may have to wait for another's last block
    if state.device.type == "cpu":
        use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.INFO if state.is_main_process else logging.ERROR)
    for chatty in ("httpx", "accelerate", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    output, progress = arguments.output_dir, state.is_main_process and not arguments.disable_tqdm
    folder = Path(arguments.model) if Path(arguments.model).is_dir() else hub.download(arguments.model)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    recommender = LaserRecommender.from_pretrained(
        folder, base_model=arguments.base_model, device=state.device, dtype=dtype
    )
    catalog = rows = recommender.items
    identity = {**item_identity(folder), "weights": str(dtype).removeprefix("torch.")}
    if arguments.items is not None:
        rejects = output / "rejects.jsonl" if state.is_main_process else None
        rows = read_items(arguments.items, rejects, arguments.max_rejected, progress)
        records = ({"item_id": item_id, **row} for item_id, row in zip(rows.item_ids, rows.attributes, strict=True))
        catalog = recommender.items.extended(records)
        identity["items"] = sha256_of_file(arguments.items)
    blocks = table_blocks(
        output,
        num_items=len(rows),
        identity=identity,
        block_size=arguments.block_size,
        dtype=torch.bfloat16 if arguments.store_bf16 else torch.float32,
        first_item=len(catalog) - len(rows),
    )
    recommender.model.set_adapter(ITEM_ADAPTER, inference_mode=True)
    encoder = recommender.encoder.over(catalog)  # which begins with the recommender's own items
    if arguments.batch_size < 1:
        raise ConfigurationError(f"batch_size must be >= 1, got {arguments.batch_size}")
    encoder.batch_size = arguments.batch_size
    autocast = torch.bfloat16 if arguments.bf16 else None
    table = encode_items_into(encoder, blocks, autocast=autocast, progress=progress)
    if state.is_main_process:
        rows.to_jsonl(output / "items.jsonl")
        print(f"{len(table):,} items of width {table.embeddings.shape[1]:,} in {output / 'item_table.safetensors'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last block", file=sys.stderr)
        sys.exit(130)
