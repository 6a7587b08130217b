"""Cells: one method with one seed, kept whole in a folder that is named by everything that decides the result."""

import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from peft_bituning.artifacts import sha256_of_file, sha256_of_json, whole_file, write_whole
from peft_bituning.errors import CheckpointError
from peft_bituning.training import LaserArguments
from peft_bituning.training.arguments import RENAMED

CELL_FILE, ERROR_FILE, LOCK_FILE, CHECKPOINTS = "cell.json", "error.txt", "lock", "checkpoints"
PACKAGES = ("peft_bituning", "torch", "transformers", "peft")
#: Fields that `LaserArguments` has no longer, by the only value that is still allowed: identities hold it in their
#: place, so that cells of before are found again.
RETIRED: dict[str, Any] = {"prefix_lr_ratio": 1.0, "suffix_lr_ratio": 1.0, "group_cuts": False}
#: What identities call a field that has another name by now.
FORMER = {name: former for former, name in RENAMED.items()}

Values = dict[str, Any]
Result = tuple[Values, Mapping[str, dict[str, Tensor]]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One method with one seed."""

    method: str
    seed: int
    identity: Values  # everything that decides its result, as JSON values
    folder: Path  # where its result is; another identity is another folder

    @property
    def name(self) -> str:
        """What it is called in print."""
        return f"{self.method}, seed {self.seed}"

    @property
    def tensor_files(self) -> tuple[str, ...]:
        """The files of tensors that belong to its result, without `.safetensors`."""
        return ()

    def path(self, tensors: str) -> Path:
        """Return where one of its `tensor_files` is."""
        return self.folder / f"{tensors}.safetensors"

    def read(self) -> Values | None:
        """Return what `cell.json` holds, or None where the result is missing, damaged, or of other settings."""
        try:
            values = json.loads((self.folder / CELL_FILE).read_text(encoding="utf-8"))
            is_whole = values["identity"] == self.identity and all(
                values[f"{name}_sha256"] == sha256_of_file(self.path(name)) for name in self.tensor_files
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return values if is_whole else None

    def fill(self, run: Callable[[], Result]) -> None:
        """Make the result and write it down, once, whichever process comes first.

        Args:
            run: goes on from its last checkpoint; returns what `cell.json` is to hold, and the tensors of each of the
                `tensor_files`. Where the checkpoint is another run's it is called again, without one.
        """
        with self._alone():
            if self.read() is not None:
                return
            (self.folder / ERROR_FILE).unlink(missing_ok=True)
            try:
                values, tensors = run()
            except CheckpointError as error:
                logger.warning("%s starts again: %s", self.name, error)
                forget_checkpoints(self.folder)
                values, tensors = run()
            values = {"identity": self.identity, **values}
            for name, content in tensors.items():
                with whole_file(self.path(name)) as temporary:
                    save_file(content, temporary)
                values[f"{name}_sha256"] = sha256_of_file(self.path(name))
            write_whole(self.folder / CELL_FILE, json.dumps(values, indent=1))  # last: what it names is there
            forget_checkpoints(self.folder)

    def fail(self, error: Exception) -> None:
        """Write down why there is no result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / ERROR_FILE, f"{type(error).__name__}: {error}\n")

    @property
    def failure(self) -> str | None:
        """Why its last run failed, where it said so."""
        path = self.folder / ERROR_FILE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder for this process; another one waits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK_FILE).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def place_cell(output_dir: str | Path, method: str, seed: int, identity: Values) -> Cell:
    """Name a cell of a folder by the sha256 of what decides its result; the packages' versions are added to it."""
    identity = {**identity, "versions": {name: version(name) for name in PACKAGES}}
    folder = Path(output_dir) / "cells" / method / f"seed-{seed}-{digest(identity, 8)}"
    return Cell(method, seed, json.loads(json.dumps(identity)), folder)


def digest(values: Any, length: int = 12) -> str:
    """Return the first digits of the sha256 (hex) over JSON values."""
    return sha256_of_json(values, sort_keys=True)[:length]


def deciding(arguments: LaserArguments, names: tuple[str, ...]) -> Values:
    """Return the settings of a run that decide a method's result, by the names that they had first: fields of
    `LaserArguments`, or of `RETIRED`.
    """
    return {FORMER.get(name, name): RETIRED[name] if name in RETIRED else getattr(arguments, name) for name in names}


def present_names(values: Values) -> Values:
    """Return settings of a file under the names that `LaserArguments` has, without what it has no longer.

    Raises:
        ValueError: one of those is not the value that it stays at.
    """
    for name in sorted(RETIRED.keys() & values.keys()):
        if values[name] != RETIRED[name]:
            raise ValueError(
                f"must leave {name} at {RETIRED[name]!r}, got {values[name]!r}; the version that took others is gone"
            )
    return {RENAMED.get(name, name): value for name, value in values.items() if name not in RETIRED}


def forget_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a trial whose result is written down."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
