"""The processes that a launcher started, what they tell each other, and the cores that each of them has."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .errors import ConfigurationError


def launched_state(timeout: timedelta | None = None) -> PartialState:
    """Return what `accelerate` knows of the processes that were launched, on machines without accelerators too.

    There `PartialState()` takes each of several processes for the only one; so does a state that was made before, and
    that is a `ConfigurationError`. The processes wait `timeout` for each other, or as long as the backend does.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    alone = found is None or found.type == "mps"  # no accelerator that processes talk through
    settings = {} if timeout is None else {"timeout": timeout}
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or (launched > 1 and alone), **settings)
    if launched > 1 and state.num_processes == 1:
        raise ConfigurationError(
            f"num_processes must be the {launched} that were launched, got 1: each would do all the work; call "
            "launched_state() before anything else of accelerate, or PartialState(cpu=True) on CPUs"
        )
    return state


def processes() -> tuple[int, int]:
    """Return how many processes there are, and which of them this one is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def gathered(values: list[Any]) -> list[Any]:
    """Return the values of all processes, first to last; they wait for one another here."""
    world, _ = processes()
    if world == 1:
        return values
    shares: list[list[Any]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(shares, values)  # accelerate's own gathers nothing where it saw no device
    return [value for share in shares for value in share]


def use_all_cores() -> None:
    """Take every core of this process's share: launchers set one thread on CPUs."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
