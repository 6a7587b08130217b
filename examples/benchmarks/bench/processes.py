"""Cells in processes of their own, one after the other."""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peft_bituning.launch import use_all_cores

from .cells import Cell

BENCHMARKS = Path(__file__).parents[1]
CHATTY = ("httpx", "accelerate", "datasets")

CellT = TypeVar("CellT", bound=Cell)

logger = logging.getLogger(__name__)


def run_missing(
    cells: Sequence[CellT], run: Callable[[CellT, str], str | None], after: Callable[[dict[str, str]], Any]
) -> dict[str, str]:
    """Run every cell that has no result yet; one that fails is no reason to lose the others.

    Args:
        cells: in their order.
        run: runs one, given how it is called in print; returns why it failed, or None.
        after: called after each with all failures so far.

    Returns:
        Why cells failed, by their names.
    """
    failed: dict[str, str] = {}
    for number, cell in enumerate(cells, start=1):
        if cell.read() is not None:
            continue
        where = f"[{number}/{len(cells)}] {cell.name}"
        print(where, flush=True)
        reason = run(cell, where)
        if reason is not None:
            failed[cell.name] = reason
            print(f"{where} failed: {reason}", flush=True)
        after(failed)
    return failed


def run_alone(cell: Cell, work: Callable[[], None]) -> str | None:
    """Run a cell in a process of its own, so that its peak memory is its own and its end nobody else's.

    Args:
        cell: one without a result.
        work: leaves the result in its folder; it has to be picklable.

    Returns:
        Why it failed, or None.
    """
    # A server that has imported everything and done nothing forks the cells: no import again, no thread or CUDA.
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    context.set_forkserver_preload(["bench.methods"])  # Python 3.11's server takes its path from the environment alone
    child = context.Process(target=_child, args=(cell, work))
    child.start()
    child.join()
    if child.exitcode == 0 and cell.read() is not None:
        return None
    if child.exitcode == 1 and cell.failure is not None:
        return cell.failure
    return f"its process ended with {child.exitcode}" + (", out of memory?" if child.exitcode == -9 else "")


def _child(cell: Cell, work: Callable[[], None]) -> None:
    _end_with_parent()
    use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        work()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        logger.exception(cell.name)
        cell.fail(error)
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when the one that started it does: nobody would look after it, and a second run may follow."""
    parent = multiprocessing.parent_process()  # not `os.getppid()`, which is the server that forked it
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(137)

    threading.Thread(target=watch, daemon=True).start()
