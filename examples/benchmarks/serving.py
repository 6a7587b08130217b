"""Milliseconds per user and resident memory of a saved recommender, with its language model and without.

    python examples/benchmarks/serving.py --model FOLDER --dataset ml-100k

Each way is loaded in a process of its own on one thread and asked for the lists of test users, one at a time (Linux).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_bituning import LaserRecommender
from peft_bituning.data import LeaveOneOut, load_interactions
from peft_bituning.serving import HybridRecommender

WAYS = ("hybrid without the language model", "hybrid with the language model", "the adapter alone")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved LaserRecommender")
    add("--dataset", default="ml-100k", help="what it was trained on, as examples/train_amazon.py takes it")
    add("--base_model", help="the language model, where its recorded name does not resolve here")
    add("--users", type=int, default=100, help="test users (%(default)s)")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def resident_mb() -> float:
    """Return the process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Load one way and ask it."""
    torch.set_num_threads(1)
    before = resident_mb()
    recommender: LaserRecommender | HybridRecommender
    if options.way == WAYS[0]:
        recommender = HybridRecommender.from_pretrained(options.model)
    else:
        recommender = LaserRecommender.from_pretrained(options.model, base_model=options.base_model, device="cpu")
    loaded = resident_mb()
    data = load_interactions(options.dataset)
    ids = data.items.item_ids
    samples = LeaveOneOut(data.histories).samples("test")[: options.users]
    histories = [[ids[item] for item in sample.history] for sample in samples]
    parts: dict[str, Any] = {} if options.way != WAYS[2] else {"parts": "laser"}
    recommender.recommend(histories[:1], **parts)  # nothing of the first request's own work is counted
    taken = []
    for history in histories:
        started = time.perf_counter()
        recommender.recommend([history], **parts)
        taken.append(1000 * (time.perf_counter() - started))
    return {
        "median": float(np.median(taken)),
        "95th": float(np.quantile(taken, 0.95)),
        "imports": before,
        "beyond imports": loaded - before,
    }


def main() -> None:
    """Print one line per way."""
    options = parse_arguments()
    if options.way:
        print(json.dumps(measure(options)))
        return
    print("| | ms per user, median | 95th of 100 | MB of imports | MB beyond them |\n| --- | --- | --- | --- | --- |")
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        cells = json.loads(done.stdout.splitlines()[-1])
        print(f"| {way} | {' | '.join(f'{value:,.1f}' for value in cells.values())} |", flush=True)


if __name__ == "__main__":
    main()
