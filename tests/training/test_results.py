"""What a run writes beside its weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peft_bituning.data import Interactions
from peft_bituning.training.results import data_hash, to_json, weight_change, write_whole


def test_weight_change() -> None:
    left = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    right = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])}
    assert weight_change(left, left) == 0
    assert weight_change(left, right) == pytest.approx(1 / 5)
    assert weight_change({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == 0


def test_data_hash_sees_every_part(few: Interactions) -> None:
    reordered = (few.histories[0][::-1], *few.histories[1:])
    renamed = ("someone", *few.user_ids[1:])
    others = [replace(few, histories=reordered), replace(few, user_ids=renamed), few.sample_users(12)]
    assert len({data_hash(data) for data in [few, *others]}) == 4
    assert data_hash(few) == data_hash(replace(few, source="elsewhere"))


def test_to_json() -> None:
    assert to_json({"a": {3, 1}, "b": (1, 2), "c": Path("x")}) == {"a": [1, 3], "b": [1, 2], "c": "x"}


def test_write_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_whole(path, json.dumps({"a": 1}))
    write_whole(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]
