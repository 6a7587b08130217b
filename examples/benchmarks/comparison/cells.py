"""Cells on the disk: run in a process of their own, kept whole, found again."""

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import CheckpointError
from peft_bituning.evaluation import RankingReport
from peft_bituning.training.methods import METHODS, Trial, TrialResult, forget_checkpoints
from peft_bituning.training.results import write_whole

from .plan import Cell, Plan

CELL_FILE, RANKS_FILE, ERROR_FILE, LOCK_FILE = "cell.json", "ranks.safetensors", "error.txt", "lock"
SHARED = "shared"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """The result of a cell.

    Args:
        cell: which one.
        report: every test user's rank.
        values: the rest of it, as `cell.json` holds it.
    """

    cell: Cell
    report: RankingReport
    values: dict[str, Any]


def read_cell(cell: Cell) -> Finished | None:
    """Return a cell's result, or None where it is missing, damaged, or of other settings."""
    try:
        values = json.loads((cell.folder / CELL_FILE).read_text(encoding="utf-8"))
        content = (cell.folder / RANKS_FILE).read_bytes()
        if values["identity"] != cell.identity or values["ranks_sha256"] != hashlib.sha256(content).hexdigest():
            return None
        ranks = load_file(cell.folder / RANKS_FILE)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return Finished(cell, RankingReport(ranks["unfiltered"], ranks["filtered"]), values)


def run_in_child(cell: Cell, command: list[str]) -> str | None:
    """Run a cell in a process of its own, so that its peak memory is its own and its end nobody else's.

    Args:
        cell: which one.
        command: this script's command line.

    Returns:
        Why it failed, or None.
    """
    child = [*command, "--cell", cell.label, str(cell.seed), "--parent", str(os.getpid())]
    done = subprocess.run([sys.executable, *child])
    if done.returncode == 0 and read_cell(cell) is not None:
        return None
    error = cell.folder / ERROR_FILE
    if done.returncode == 1 and error.is_file():
        return error.read_text(encoding="utf-8").strip()
    return f"its process ended with {done.returncode}" + (", out of memory?" if done.returncode == -9 else "")


def run_cell(plan: Plan, cell: Cell, data: Interactions) -> None:
    """Train and evaluate one cell in this process, from its checkpoint on, and write its result.

    Args:
        plan: the comparison.
        cell: one of its cells.
        data: the histories.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = Path(plan.output_dir) / SHARED
    shared.mkdir(parents=True, exist_ok=True)
    trial = Trial(
        cell.method,
        cell.settings,
        data,
        LeaveOneOut(data.histories),
        plan.load_base,
        cell.arguments,
        shared,
        device,
    )
    started = time.perf_counter()
    with _alone_in(cell.folder):
        if read_cell(cell) is not None:
            return
        (cell.folder / ERROR_FILE).unlink(missing_ok=True)
        try:
            result = METHODS[cell.method].run(trial)
        except CheckpointError as error:
            logger.warning("%s starts again: %s", cell.label, error)
            forget_checkpoints(cell.folder)
            result = METHODS[cell.method].run(trial)
        _write(cell, result, time.perf_counter() - started)
        forget_checkpoints(cell.folder)


def write_error(cell: Cell, error: BaseException) -> None:
    """Keep why a cell failed, for the table."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_whole(cell.folder / ERROR_FILE, f"{type(error).__name__}: {error}\n")


def end_with(parent: int) -> None:
    """End this process when its parent does: nobody would look after it, and a second run may follow."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(137)

    threading.Thread(target=watch, daemon=True).start()


def _write(cell: Cell, result: TrialResult, seconds: float) -> None:
    report = result.report
    path = cell.folder / RANKS_FILE
    save_file({"unfiltered": report.ranks_unfiltered, "filtered": report.ranks_filtered}, path)
    values = {
        "identity": cell.identity,
        "label": cell.label,
        "test": report.metrics(),
        "valid": result.valid,
        "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": result.adapter_bytes,
        "phases": result.phases,
        "trained": result.trained,
        "details": result.details,
        "seconds_this_run": seconds,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "ranks_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    write_whole(cell.folder / CELL_FILE, json.dumps(values, indent=1))  # last: what it names is there


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a cell's folder for this process; another one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
