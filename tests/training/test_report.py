"""What a run writes beside its weights."""

import pytest
import torch

from peft_bituning.training.report import weight_change


def test_weight_change() -> None:
    left = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    right = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])}
    assert weight_change(left, left) == 0
    assert weight_change(left, right) == pytest.approx(1 / 5)
    assert weight_change({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == 0
