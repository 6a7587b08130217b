"""Measures what a table of 256 MB takes: `python table_memory.py FOLDER` prints one JSON object.

Each figure is the peak of anonymous memory (what no file backs) within a step beyond that before it, MB.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peft_bituning.catalog import ItemTable, table_blocks

ITEMS, WIDTH, BLOCK = 65_536, 1_024, 4_096
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


def anonymous() -> float:
    """Return the anonymous memory of this process, MB."""
    found = _ANONYMOUS.search(Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measured(step: Callable[[], Any]) -> tuple[Any, float]:
    """Run a step while another thread looks at the memory."""
    before = anonymous()
    peak, running = before, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = step()
    running = False
    watcher.join()
    return result, peak - before


def main(folder: Path) -> None:
    """Write blocks, and go through everything that is done to a table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    blocks = replace(table_blocks(folder, ITEMS, {}, BLOCK), shape=(ITEMS, WIDTH))
    blocks.create()
    found: dict[str, float] = {}

    def write() -> None:
        for block in range(blocks.num_blocks):
            rows = ItemTable.from_embeddings(torch.randn(BLOCK, WIDTH, generator=generator))
            blocks.write(block, rows.embeddings)

    _, found["write blocks"] = measured(write)
    finished, found["verify blocks"] = measured(blocks.finished)
    path = folder / "item_table.safetensors"
    table, found["load"] = measured(lambda: ItemTable.load(path, ITEMS))
    assert len(finished) == blocks.num_blocks
    _, found["checksum"] = measured(table.checksum)
    _, found["save"] = measured(lambda: table.save(path))
    _, found["score"] = measured(lambda: table.scores(torch.ones(4, WIDTH)))
    ItemTable(table.embeddings.bfloat16()).save(folder / "halves.safetensors")
    halves = ItemTable.load(folder / "halves.safetensors", ITEMS)
    _, found["score bfloat16"] = measured(lambda: halves.scores(torch.ones(4, WIDTH)))
    _, found["a copy"] = measured(table.embeddings.clone)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
