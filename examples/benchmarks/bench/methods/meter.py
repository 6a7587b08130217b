"""Seconds and peak memory of the phases of a run."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MIB = 2**20
TIMED_USERS = 20

UserT = TypeVar("UserT")


@dataclass
class Meter:
    """Measures phases, each with a peak of its own where the system can tell.

    Args:
        device: its memory is measured too where it is a CUDA device.
        phases: what was measured, by phase: `seconds`, `peak_memory_mb` of the process, `peak_cuda_mb` on CUDA, and
            `own_peak`: whether the peak is the phase's own; elsewhere it is the process's so far.
    """

    device: torch.device
    phases: dict[str, dict[str, float | bool]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a name that is measured again replaces what it said."""
        own_peak = _reset_peak()
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        yield
        if on_cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        measured: dict[str, float | bool] = {"seconds": seconds, "peak_memory_mb": _peak_mb(), "own_peak": own_peak}
        if on_cuda:
            measured["peak_cuda_mb"] = torch.cuda.max_memory_allocated(self.device) / _MIB
        self.phases[name] = measured


def time_users(meter: Meter, rank: Callable[[UserT], object], users: Sequence[UserT]) -> None:
    """Measure the median time of the first users, from history to ranked catalog, as the phase `user`."""
    rank(users[0])  # nothing of the first pass's own work is counted
    seconds: list[float] = []
    with meter.phase("user"):
        for user in users[:TIMED_USERS]:
            started = time.perf_counter()
            rank(user)
            seconds.append(time.perf_counter() - started)
    meter.phases["user"] |= {"seconds": median(seconds), "users": len(seconds)}


def _reset_peak() -> bool:
    """Start the process's peak memory anew; only Linux can, and not in every sandbox."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _high_water_mark() is not None


def _peak_mb() -> float:
    """Return the peak resident memory, MiB, since the last reset, or of the whole process where there is none."""
    mark = _high_water_mark()
    if mark is not None:
        return mark / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def _high_water_mark() -> float | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
