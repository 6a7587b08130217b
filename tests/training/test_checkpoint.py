"""Checkpoints: write, read, rotate, link, and the states a kill leaves."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_bituning.errors import CheckpointError
from peft_bituning.training.checkpoint import (
    MARKER_FILE,
    Checkpoint,
    CheckpointStore,
    flatten_optimizer,
    random_state,
    restore_optimizer,
    restore_random_state,
)


def _checkpoint(number: int) -> Checkpoint:
    return Checkpoint(
        {"number": number, "nested": {"values": [1.5, None, "x"]}},
        {"adapter": {"w": torch.full((2, 3), float(number))}, "items-1": {"table": torch.arange(4.0)}},
    )


def _latest(folder: Path) -> int:
    found = CheckpointStore(folder).load_latest()
    assert found is not None
    assert torch.equal(found.tensors["adapter"]["w"], torch.full((2, 3), float(found.state["number"])))
    return found.state["number"]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_yet(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.complete() == []
    assert store.load_latest() is None
    store.clear()


def test_write_and_read(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save(7, _checkpoint(7))
    assert path.name == "step-00000000-00000007"
    found = CheckpointStore(tmp_path).load_latest()
    assert found is not None
    assert found.state == _checkpoint(7).state
    assert found.tensors.keys() == {"adapter", "items-1"}
    assert torch.equal(found.tensors["items-1"]["table"], torch.arange(4.0))


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for number in range(5):
        store.save(3, _checkpoint(number))  # the same step twice, as at the end of a stage
    assert _names(tmp_path) == ["step-00000003-00000003", "step-00000004-00000003"]
    assert _latest(tmp_path) == 4


def test_constant_files_are_linked(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    first = store.save(1, _checkpoint(1), constant="items-")
    second = store.save(2, _checkpoint(2), constant="items-")
    assert os.path.samefile(first / "items-1.safetensors", second / "items-1.safetensors")
    assert not os.path.samefile(first / "adapter.safetensors", second / "adapter.safetensors")
    store.save(3, _checkpoint(3), constant="items-")
    assert _latest(tmp_path) == 3  # the first name of the linked file is gone


@pytest.mark.parametrize("harm", ["truncate", "change", "remove", "state", "marker"])
def test_damaged_newest_falls_back(tmp_path: Path, harm: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, _checkpoint(1))
    newest = store.save(2, _checkpoint(2))
    _harm(newest, harm)
    assert _latest(tmp_path) == 1


def _harm(folder: Path, harm: str) -> None:
    file = folder / "adapter.safetensors"
    if harm == "truncate":
        os.truncate(file, file.stat().st_size - 4)
    elif harm == "change":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "remove":
        file.unlink()
    elif harm == "state":
        (folder / "state.json").write_text("{")
    else:
        (folder / MARKER_FILE).write_text("[]")


def test_damage_does_not_spread_by_links(tmp_path: Path) -> None:
    writer = CheckpointStore(tmp_path, keep=2)
    writer.save(1, _checkpoint(1))
    newest = writer.save(2, _checkpoint(2), constant="nothing")
    os.truncate(newest / "items-1.safetensors", 20)
    store = CheckpointStore(tmp_path, keep=2)
    found = store.load_latest()
    assert found is not None and found.state["number"] == 1
    store.save(3, _checkpoint(3), constant="items-")
    assert _latest(tmp_path) == 3


def test_all_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for number in (1, 2):
        _harm(store.save(number, _checkpoint(number)), "truncate")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints .* can be used: .*overwrite_output_dir"):
        store.load_latest()


def test_killed_before_the_rename(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, _checkpoint(1))
    for name in (".step-00000001-00000002.tmp", ".step-00000001-00000009.tmp", "tmp-step-00000001-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").write_bytes(b"half")
    assert _latest(tmp_path) == 1
    CheckpointStore(tmp_path, keep=1).save(2, _checkpoint(2))
    assert _names(tmp_path) == ["step-00000001-00000002"]
    assert _latest(tmp_path) == 2


def test_killed_between_rename_and_marker(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, _checkpoint(1))
    (store.save(2, _checkpoint(2)) / MARKER_FILE).unlink()
    assert _latest(tmp_path) == 1
    CheckpointStore(tmp_path).save(2, _checkpoint(3))  # takes the unmarked one's name
    assert _latest(tmp_path) == 3


def test_killed_within_rotation(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    old = store.save(1, _checkpoint(1))
    store.save(2, _checkpoint(2))
    (old / MARKER_FILE).unlink()
    (old / "adapter.safetensors").unlink()
    assert _latest(tmp_path) == 2
    CheckpointStore(tmp_path, keep=2).save(3, _checkpoint(3))
    assert not old.exists()


def test_clear(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "all")
    store.save(1, _checkpoint(1))
    store.clear()
    assert not (tmp_path / "all").exists()
    store.save(1, _checkpoint(1), constant="items-")
    assert _latest(tmp_path / "all") == 1


def test_optimizer_round_trip(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Tensor, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)))
        return weight, torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)

    def step(weight: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()

    weight, optimizer = made(0)
    for _ in range(3):
        step(weight, optimizer)
    saved, tensors = flatten_optimizer(optimizer)
    store = CheckpointStore(tmp_path)
    store.save(3, Checkpoint({"optimizer": saved}, {"optimizer": tensors, "w": {"w": weight.detach()}}))
    step(weight, optimizer)

    found = store.load_latest()
    assert found is not None
    other, fresh = made(1)
    other.data.copy_(found.tensors["w"]["w"])
    restore_optimizer(fresh, found.state["optimizer"], found.tensors["optimizer"])
    step(other, fresh)
    assert torch.equal(other, weight)


def test_random_state_round_trip() -> None:
    before = random_state()
    try:
        saved: dict[str, Any] = json.loads(json.dumps(random_state()))
        drawn = (random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist())
        restore_random_state(saved)
        assert (random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist()) == drawn
    finally:
        restore_random_state(before)
