"""What a run writes beside its weights."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from peft_bituning.data import Interactions
from peft_bituning.training.results import data_hash, weight_change


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


def test_data_hash_stays_what_it_is(few: Interactions) -> None:
    """Runs of before are gone on with, and finished ones known again, by it."""
    parts = [json.dumps(few.items.item_ids), json.dumps([few.user_ids, few.histories])]
    assert data_hash(few) == hashlib.sha256("".join(parts).encode()).hexdigest()
