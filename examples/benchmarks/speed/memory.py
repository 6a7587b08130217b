"""Peak memory of one step beyond what was there before it, each way in a fresh process (Linux)."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import loss
import setting
import torch
import train_step

STEPS = (
    train_step.TEXTBOOK,
    "PEFT prompt tuning",
    "PEFT LoRA, rank 8",
    "ours, static",
    "ours, M-Former",
)
LOSS_SIZES = ((8, 1_000_000), (256, 1_000_000))  # users, items
LOSSES = (loss.TEXTBOOK, "ours (chooses by B x I)")
PROCESSES = 2


def measure(way: Callable[[], object]) -> float:
    """Call a way and return its peak beyond what was resident before it, MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    way()
    return (_status("VmHWM") - before) / 1000


def run(meanwhile: Callable[[], None] | None = None) -> None:
    """Print one table a task.

    Args:
        meanwhile: called while one process after the other is measured; None measures two at a time.
    """
    tasks = [("train step", f"train_step/{name}", name) for name in STEPS]
    tasks += [
        (f"loss: {rows} users, {items:,} items", f"loss/{rows}/{items}/{name}", name)
        for rows, items in LOSS_SIZES
        for name in LOSSES
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1 if meanwhile else PROCESSES) as pool:
        setting.save(folder)
        environment = {**os.environ, setting.SAVED: folder}

        def child(key: str) -> float:
            done = subprocess.run(
                [sys.executable, __file__, key], capture_output=True, text=True, check=True, env=environment
            )
            return float(done.stdout.split()[-1])

        found = pool.map(child, [key for _, key, _ in tasks])
        if meanwhile:
            meanwhile()
        title = ""
        for (task, _, name), megabytes in zip(tasks, found, strict=True):
            if task != title:
                title = task
                print(f"\n### memory: {task}\n\n| | MB beyond what was there |\n| --- | --- |")
            print(f"| {name} | {megabytes:,.0f} |", flush=True)


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
