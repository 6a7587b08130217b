"""Peak memory of one step beyond what was there before it, each way in a fresh process (Linux)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import loss
import torch
import train_step

STEPS = (
    "textbook, static prefix",
    "start once a batch, static",
    "whole rows, M-Former",
    "PEFT prompt tuning",
    "PEFT LoRA, rank 8",
)
LOSS_SIZES = ((8, 1_000_000), (256, 1_000_000))  # users, items


def measure(way: Callable[[], object]) -> float:
    """Call a way and return its peak beyond what was resident before it, MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    way()
    return (_status("VmHWM") - before) / 1000


def run() -> None:
    """Print one table a task."""
    tasks = [("train step", f"train_step/{name}", name) for name in STEPS]
    tasks += [
        (f"loss: {rows} users, {items:,} items", f"loss/{rows}/{items}/{name}", name)
        for rows, items in LOSS_SIZES
        for name in loss.WAYS
    ]
    title = ""
    for task, key, name in tasks:
        if task != title:
            title = task
            print(f"\n### memory: {task}\n\n| | MB beyond what was there |\n| --- | --- |")
        done = subprocess.run([sys.executable, __file__, key], capture_output=True, text=True, check=True)
        print(f"| {name} | {float(done.stdout.split()[-1]):,.0f} |", flush=True)


def _status(field: str) -> float:
    """A field of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, *rest = sys.argv[1].split("/")
    if task == "loss":
        print(measure(loss.Losses(int(rest[1]), int(rest[0])).build(rest[2])))
    else:
        print(measure(train_step.Steps().build(rest[0])))
