"""Speed on one CPU thread, as ratios within one run: process time, in turns, median and range; and memory (Linux).

    python examples/benchmarks/speed                       # all: memory on one core while another is timed
    python examples/benchmarks/speed rank loss
    python examples/benchmarks/speed train_step --steps    # and what lies between textbook and ours
    python examples/benchmarks/speed train_step encode --items 48 --dataset folder:PATH --attributes none

`train_step` and `encode` take the quickstart's language model and films, or random ones where their packages are
missing, or histories and titles of your own; the rows of sentence-transformers and faiss want those packages.
"""

import argparse
import os
from collections.abc import Collection
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy multiplies a single query

import encode
import hybrid_rank
import limit
import loss
import memory
import rank
import setting
import torch
import train_step

from peft_bituning.assembly import read_template
from peft_bituning.errors import BiTuningError

BENCHMARKS = ("train_step", "encode", "loss", "rank", "hybrid", "memory")
HAS_PROC = Path("/proc/self/clear_refs").exists()  # what memory is read from


def main() -> None:
    """Print the machine's limit and one table a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="|".join(BENCHMARKS), help="which ones; none is all")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is timed")
    parser.add_argument("--items", type=int, default=12, help="titles that encode takes")
    parser.add_argument("--steps", action="store_true", help="also time what lies between textbook and ours")
    parser.add_argument(
        "--table_items",
        type=int,
        nargs="+",
        default=[4385, 1_000_000],
        help="items of the loss's and the index's table",
    )
    parser.add_argument("--dataset", help="for train_step, encode and memory: data as `fit` reads it, not films")
    parser.add_argument("--attributes", nargs="+", default=[], help="what stands beside its titles; none for nothing")
    arguments = parser.parse_args()
    chosen = arguments.benchmarks or (BENCHMARKS if HAS_PROC else BENCHMARKS[:-1])
    if unknown := set(chosen) - set(BENCHMARKS):
        parser.error(f"choose from {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")
    for name, value in ((setting.DATASET, arguments.dataset), (setting.ATTRIBUTES, "\n".join(arguments.attributes))):
        if value:
            os.environ[name] = value  # for the processes of memory, too
    try:
        read_template("paper", arguments.attributes, setting.interactions().items)
    except BiTuningError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    default, best, exact = limit.measure()
    print(
        f"float32 matmul on one thread: {default / 1e9:.0f} GFLOP/s; with oneDNN's own kernel "
        + (f"{best / 1e9:.0f} GFLOP/s, exact here" if exact else "not exact here, and off")
    )
    timed = [name for name in BENCHMARKS[:-1] if name in chosen]
    if "memory" not in chosen:
        run_timed(timed, best, arguments)
    else:
        memory.run((lambda: run_timed(timed, best, arguments)) if timed else None)


def run_timed(chosen: Collection[str], best: float, arguments: argparse.Namespace) -> None:
    """Print a table for each benchmark that is timed.

    Args:
        chosen: their names.
        best: the machine's matmul rate, FLOP/s.
        arguments: how often, and how much.
    """
    if "train_step" in chosen:
        train_step.run(best, arguments.rounds, arguments.steps)
    if "encode" in chosen:
        encode.run(best, arguments.items, arguments.rounds, arguments.steps)
    if "loss" in chosen:
        for items in arguments.table_items:
            loss.run(best, items, arguments.rounds)
    if "rank" in chosen:
        for items in arguments.table_items:
            for queries in (1, 32):
                rank.run(best, items, queries, arguments.rounds)
    if "hybrid" in chosen:
        for items in arguments.table_items:
            for queries in (1, 32):
                hybrid_rank.run(items, queries, arguments.rounds, HAS_PROC)


if __name__ == "__main__":
    main()
