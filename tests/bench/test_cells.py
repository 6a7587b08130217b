"""The store of cells: what is found again, what is run again."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.cells import Cell, place_cell
from safetensors.torch import load_file, save_file

from peft_bituning.errors import CheckpointError


class WithRanks(Cell):
    @property
    def tensor_files(self) -> tuple[str, ...]:
        return ("ranks",)


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return WithRanks(**vars(place_cell(tmp_path, "laser", 3, {"setting": (1, 2), "seed": 3})))


def fill(cell: Cell, value: float = 1.0) -> None:
    cell.fill(lambda: ({"value": value}, {"ranks": {"unfiltered": torch.full((30,), value)}}))


def test_its_place_says_what_decides_it(cell: Cell, tmp_path: Path) -> None:
    assert cell.name == "laser, seed 3" and cell.folder.parent == tmp_path / "cells" / "laser"
    assert cell.identity["setting"] == [1, 2] and cell.identity["versions"].keys() > {"torch", "peft"}
    again = place_cell(tmp_path, "laser", 3, {"seed": 3, "setting": [1, 2]})
    assert (again.folder, again.identity) == (cell.folder, cell.identity)
    assert place_cell(tmp_path, "laser", 3, {"seed": 3, "setting": [1, 3]}).folder != cell.folder


def test_it_is_filled_once_and_found_again(cell: Cell) -> None:
    assert cell.read() is None
    cell.fail(ValueError("too little"))
    assert cell.failure == "ValueError: too little" and cell.read() is None
    (cell.folder / "checkpoints").mkdir()
    fill(cell)
    assert cell.failure is None and not (cell.folder / "checkpoints").exists()
    fill(cell, 2.0)
    values = cell.read()
    assert values is not None and (values["value"], values["identity"]) == (1.0, cell.identity)
    assert load_file(cell.path("ranks"))["unfiltered"].tolist() == [1.0] * 30
    other = WithRanks(cell.method, cell.seed, {**cell.identity, "setting": 0}, cell.folder)
    assert other.read() is None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ranks.safetensors", lambda path: os.truncate(path, 40)),
        ("ranks.safetensors", lambda path: save_file({"unfiltered": torch.zeros(30)}, path)),
        ("ranks.safetensors", os.unlink),
        ("cell.json", lambda path: os.truncate(path, 40)),
        ("cell.json", os.unlink),
    ],
)
def test_a_damaged_cell_is_run_again(name: str, damage: Any, cell: Cell, tmp_path: Path) -> None:
    fill(cell)
    shutil.copyfile(cell.folder / name, tmp_path / "kept")
    damage(cell.folder / name)
    assert cell.read() is None
    shutil.copyfile(tmp_path / "kept", cell.folder / name)
    assert cell.read() is not None


def test_a_checkpoint_of_another_run_is_left_behind(cell: Cell) -> None:
    checkpoints = cell.folder / "checkpoints"
    checkpoints.mkdir(parents=True)

    def run() -> Any:
        if checkpoints.exists():
            raise CheckpointError("of another run")
        return {}, {"ranks": {}}

    cell.fill(run)
    assert cell.read() is not None
