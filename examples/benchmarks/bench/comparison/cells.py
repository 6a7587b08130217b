"""Cells on the disk: run in a process of their own, kept whole, found again."""

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from bench.methods import METHODS, Trial, TrialResult, forget_checkpoints, merge_lora
from bench.methods.kept_weights import KeptWeights
from peft_bituning.artifacts import write_whole
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import CheckpointError
from peft_bituning.evaluation import RankingReport
from peft_bituning.launch import use_all_cores

from .plan import Cell, Plan

CELL_FILE, RANKS_FILE, ERROR_FILE, LOCK_FILE = "cell.json", "ranks.safetensors", "error.txt", "lock"
WEIGHTS_FILE = "weights.safetensors"
SHARED = "shared"
BENCHMARKS = Path(__file__).parents[2]

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
        if cell.keeps_weights and values["weights_sha256"] != _sha256(cell.folder / WEIGHTS_FILE):
            return None
        ranks = load_file(cell.folder / RANKS_FILE)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return Finished(cell, RankingReport(ranks["unfiltered"], ranks["filtered"]), values)


def run_in_child(plan: Plan, cell: Cell) -> str | None:
    """Run a cell in a process of its own, so that its peak memory is its own and its end nobody else's.

    Args:
        plan: the comparison.
        cell: one of its cells.

    Returns:
        Why it failed, or None.
    """
    # A server that has imported everything and done nothing forks the cells: no import again, no thread or CUDA.
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    context.set_forkserver_preload(["bench.methods"])  # Python 3.11's server takes its path from the environment alone
    child = context.Process(target=_child, args=(plan, cell))
    child.start()
    child.join()
    if child.exitcode == 0 and read_cell(cell) is not None:
        return None
    error = cell.folder / ERROR_FILE
    if child.exitcode == 1 and error.is_file():
        return error.read_text(encoding="utf-8").strip()
    return f"its process ended with {child.exitcode}" + (", out of memory?" if child.exitcode == -9 else "")


def _child(plan: Plan, cell: Cell) -> None:
    _end_with_parent()
    use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for chatty in ("httpx", "accelerate", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        run_cell(plan, cell, plan.load_data(cell.on_source))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a row that fails is no reason to lose the others
        logger.exception("%s, seed %d", cell.label, cell.seed)
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_whole(cell.folder / ERROR_FILE, f"{type(error).__name__}: {error}\n")
        sys.exit(1)


def run_cell(plan: Plan, cell: Cell, data: Interactions) -> None:
    """Train and evaluate one cell in this process, from its checkpoint on, and write its result.

    Args:
        plan: the comparison.
        cell: one of its cells; what it starts from is there.
        data: the histories.

    Raises:
        CheckpointError: what it starts from is not there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = Path(plan.output_dir) / SHARED
    shared.mkdir(parents=True, exist_ok=True)
    trial = Trial(
        cell.method,
        cell.settings,
        data,
        LeaveOneOut(data.histories).drawn(cell.share, cell.seed),
        partial(_load_base, plan, cell),
        cell.arguments,
        shared,
        device,
        None if cell.source is None else _kept_weights(cell.source),
        cell.keeps_weights,
    )
    started = time.perf_counter()
    with alone_in(cell.folder):
        if read_cell(cell) is not None:
            return
        (cell.folder / ERROR_FILE).unlink(missing_ok=True)
        try:
            result = METHODS[cell.method].run(trial)
        except CheckpointError as error:
            logger.warning("%s starts again: %s", cell.label, error)
            forget_checkpoints(cell.folder)
            result = METHODS[cell.method].run(trial)
        _write(cell, result, data, time.perf_counter() - started)
        forget_checkpoints(cell.folder)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a cell's folder for this process; another one waits.

    Args:
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end_with_parent() -> None:
    """End this process when the one that started it does: nobody would look after it, and a second run may follow."""
    parent = multiprocessing.parent_process()  # not `os.getppid()`, which is the server that forked it
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(137)

    threading.Thread(target=watch, daemon=True).start()


def _write(cell: Cell, result: TrialResult, data: Interactions, seconds: float) -> None:
    report = result.report
    path = cell.folder / RANKS_FILE
    save_file({"unfiltered": report.ranks_unfiltered, "filtered": report.ranks_filtered}, path)
    values: dict[str, Any] = {
        "identity": cell.identity,
        "label": cell.label,
        "dataset": data.counts(),
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
        "ranks_sha256": _sha256(path),
    }
    if result.weights is not None:
        save_tensors(result.weights.to_tensors(), cell.folder / WEIGHTS_FILE)
        values["weights_sha256"] = _sha256(cell.folder / WEIGHTS_FILE)
    if cell.first is not None and (first := read_cell(cell.first)) is not None:
        values["source" if cell.source is not None else "over"] = {
            "dataset": first.values["dataset"],
            "row": cell.first.label,
            "rows": first.values["trained"]["rows"],
            "seconds": first.values["phases"]["training"]["seconds"],
        }
    write_whole(cell.folder / CELL_FILE, json.dumps(values, indent=1))  # last: what it names is there


def _load_base(plan: Plan, cell: Cell) -> BaseModel:
    """Load the language model, with the LoRA merged into it that the cell trains over."""
    base = plan.load_base()
    if cell.over is None:
        return base
    return merge_lora(base, cell.over.settings, _kept_weights(cell.over).users, cell.over.arguments)


def _kept_weights(source: Cell) -> KeptWeights:
    if read_cell(source) is None:
        raise CheckpointError(f"the weights of {source.label} to start from are not there; run the comparison again")
    return KeptWeights.from_tensors(load_tensors(source.folder / WEIGHTS_FILE))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
