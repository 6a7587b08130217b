"""Growth of time and memory with items and tokens: one fresh process a figure, one thread.

    python examples/benchmarks/speed/growth.py               # all of it, a quarter of an hour
    python examples/benchmarks/speed/growth.py loss rank

Seconds are process time: the median of three calls after one that gives the memory (of one call where it takes long).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy multiplies a single query

import encode
import loss
import memory
import setting
import torch
from train_step import SMALL

from peft_bituning.catalog import ExactIndex, ItemTable
from peft_bituning.matmul import fast_cpu_matmul

WIDTH, USERS = 576, 32
ITEMS = (1_000, 10_000, 100_000, 1_000_000)
LONG = 20.0  # seconds; what takes longer is not called again
TABLES = {
    "loss": ("items", ITEMS, "the loss of 8 users and its gradient"),
    "rank": ("items", ITEMS, f"the ten best items of {USERS} users"),
    "table": ("items", ITEMS, "loading the file of a table and the ten best items of one user (mapped pages count)"),
    "encode": ("items", (1_000, 10_000), "encoding the catalog, static prefix, probed matmul"),
    "train": ("tokens", (10, 25, 50, 100, 200), "a step on 8 histories, forward and backward, probed matmul"),
}


def build(task: str, size: int, prefix: str) -> Callable[[], object]:
    """Return what a process calls for one figure."""
    generator = torch.Generator().manual_seed(0)
    if task == "loss":
        return loss.Losses(size).build("ours (chooses by B x I)")
    if task == "encode":
        titles = encode.Titles(1)
        titles.items = [item % titles.known for item in range(size)]
        return titles.ours("static, probed matmul")
    if task == "train":
        return _step(size, prefix, generator)
    table = ItemTable.from_embeddings(torch.randn(size, WIDTH, generator=generator))
    users = torch.randn(USERS if task == "rank" else 1, WIDTH, generator=generator)
    if task == "rank":
        index = ExactIndex(table.embeddings)
        return lambda: index.search(users, 10)
    path = Path(os.environ[setting.SAVED], "item_table.safetensors")
    table.save(path)
    return lambda: ExactIndex(ItemTable.load(path).embeddings).search(users, 10)


def _step(tokens: int, prefix: str, generator: torch.Generator) -> Callable[[], None]:
    settings: dict[str, Any] = {"prefix_encoder": "static"} if prefix == "static" else SMALL
    model = setting.tuned(**settings).train()
    opening = torch.randint(9, 9999, (1, 34), generator=generator).expand(8, -1)
    text = torch.cat([opening, torch.randint(9, 9999, (8, tokens), generator=generator)], dim=1)
    inputs: dict[str, Any] = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if prefix != "static":
        inputs["collaborative_embeds"] = torch.randn(8, 10, 64, generator=generator)
    own = [value for value in model.parameters() if value.requires_grad]

    def step() -> None:
        with fast_cpu_matmul():
            torch.autograd.grad(model(**inputs).pooler_output.square().sum(), own, allow_unused=True)

    return step


def child(task: str, size: int, prefix: str) -> None:
    """Print the seconds and the megabytes of one figure."""
    torch.set_num_threads(1)
    call = build(task, size, prefix)
    start = time.process_time()
    megabytes = memory.measure(call)
    taken = [time.process_time() - start]
    if taken[0] < LONG:
        taken = []
        for _ in range(3):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    print(statistics.median(taken), megabytes)


def main() -> None:
    """Print one table a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="|".join(TABLES), help="which ones; none is all")
    tasks = parser.parse_args().tasks or list(TABLES)
    if unknown := set(tasks) - set(TABLES):
        parser.error(f"choose from {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, setting.SAVED: folder}
        if {"encode", "train"} & set(tasks):
            setting.save(folder)
        for task in tasks:
            unit, sizes, what = TABLES[task]
            print(
                f"\n### growth: {what}\n\n| {unit} | | seconds | MB beyond what was there |\n| --- | --- | --- | --- |"
            )
            for size in sizes:
                for prefix in ("static", "M-Former") if task == "train" else ("static",):
                    command = [sys.executable, __file__, "--figure", task, str(size), prefix]
                    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                    seconds, megabytes = map(float, done.stdout.split()[-2:])
                    kind = prefix if task == "train" else ""
                    print(f"| {size:,} | {kind} | {seconds:.4f} | {megabytes:,.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--figure"]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
