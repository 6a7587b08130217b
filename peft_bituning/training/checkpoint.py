"""Checkpoints that survive a kill at any moment."""

import json
import logging
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..artifacts import sha256_of_file, whole_folder, write_whole
from ..errors import CheckpointError

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
MARKER_FILE = "complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: JSON state and groups of tensors, never the frozen weights.

    Args:
        state: anything JSON can hold.
        tensors: groups of tensors by name; each becomes one safetensors file.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class CheckpointStore:
    """A folder of checkpoints, of which at least one is usable once one was written.

    A checkpoint is written to a temporary folder, synced, renamed, marked complete with the sha256 of its files,
    and only then are older ones removed.

    Args:
        folder: where they are kept.
        keep: how many complete ones.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._whole: Path | None = None  # the newest one known to be undamaged: written or read by this object

    def complete(self) -> list[Path]:
        """Return the folders of complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.glob("step-*") if (path / MARKER_FILE).is_file()]
        return sorted(found, key=lambda path: path.name)

    def save(self, step: int, checkpoint: Checkpoint, constant: str = "") -> Path:
        """Write a checkpoint; return its folder.

        Args:
            step: optimizer updates so far, over both stages; part of the folder's name.
            checkpoint: what to write.
            constant: groups whose name begins with this never change under one name: where the checkpoint that was
                written or read last has such a file, it is linked and not written again.
        """
        previous = self.complete()
        number = int(previous[-1].name.split("-")[1]) + 1 if previous else 0
        final = self.folder / f"step-{number:08d}-{step:08d}"  # one that is there was never marked
        with whole_folder(final) as temporary:
            for group, tensors in checkpoint.tensors.items():
                target = temporary / f"{group}.safetensors"
                source = None if self._whole is None else self._whole / target.name
                if constant and group.startswith(constant) and source is not None and source.is_file():
                    _link(source, target)
                else:
                    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, target)
            (temporary / STATE_FILE).write_text(json.dumps(checkpoint.state))
            marker = {path.name: sha256_of_file(path) for path in sorted(temporary.iterdir())}
        write_whole(final / MARKER_FILE, json.dumps(marker))
        self._whole = final
        self._rotate(final)
        return final

    def load_latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is complete and whole; None where none was ever completed.

        Raises:
            CheckpointError: there are complete ones, but every one of them is damaged.
        """
        problems: list[str] = []
        for folder in reversed(self.complete()):
            try:
                checkpoint = self._load(folder)
            except CheckpointError as error:
                problems.append(str(error))
                logger.warning("a checkpoint cannot be used, trying the one before: %s", error)
                continue
            self._whole = folder
            return checkpoint
        if problems:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self.folder.name} can be used: {'; '.join(problems)}; "
                "start again with --overwrite_output_dir"
            )
        return None

    def clear(self) -> None:
        """Remove every checkpoint and what else the folder holds; a kill leaves the newest ones whole or none."""
        for folder in self.complete():
            (folder / MARKER_FILE).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._whole = None

    def _load(self, folder: Path) -> Checkpoint:
        try:
            for name, digest in _read_json(folder / MARKER_FILE).items():
                if sha256_of_file(folder / name) != digest:
                    raise CheckpointError(f"{folder.name}/{name} was changed after it was written")
            state = _read_json(folder / STATE_FILE)
            tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{folder.name} cannot be read ({error})") from error
        return Checkpoint(state, tensors)

    def _rotate(self, newest: Path) -> None:
        for folder in self.complete()[: -self.keep]:
            (folder / MARKER_FILE).unlink()  # incomplete first, so that a half-removed one is never read
            shutil.rmtree(folder)
        for leftover in self.folder.glob("*step-*"):
            if leftover != newest and not (leftover / MARKER_FILE).is_file():
                shutil.rmtree(leftover, ignore_errors=True)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split an optimizer's state into JSON and tensors, the latter by `<parameter number>.<name>`."""
    state = optimizer.state_dict()
    values = {f"{index}.{key}": value for index, named in state["state"].items() for key, value in named.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if name not in tensors}
    return {"groups": state["param_groups"], "numbers": numbers}, tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put back what `flatten_optimizer` took out, over the same parameters in the same order."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *saved["numbers"].items()]:
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": saved["groups"]})


def random_state() -> dict[str, Any]:
    """Return the states of the random generators of Python, numpy and torch, as JSON can hold them."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_random_state(saved: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(saved["torch"], dtype=torch.uint8))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(state, dtype=torch.uint8) for state in saved["cuda"]])


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
