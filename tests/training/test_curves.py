"""The picture of the training curves."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from peft_bituning.training.curves import plot_curves


def _epochs(with_experts: bool) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "global_step": 10 * step,
            "train_contrastive_loss": 3.0 / step,
            "valid": {"unfiltered": {"ndcg@10": 0.1 * step}, "filtered": {"ndcg@10": 0.15 * step}},
            "expert_load": [0.25, 0.75] if with_experts else None,
        }
        for step, stage in enumerate((1, 1, 2), start=1)
    ]


LOGS = [{"stage": 1 + step // 20, "step": step, "contrastive_loss": 3.0 / (1 + step)} for step in range(30)]


def test_three_panels_with_experts_and_two_without(tmp_path: Path) -> None:
    assert plot_curves(tmp_path / "three.png", _epochs(True), LOGS)
    assert plot_curves(tmp_path / "two.png", _epochs(False), LOGS)
    three, two = (image.imread(tmp_path / f"{name}.png") for name in ("three", "two"))
    assert three.shape[1] == 1.5 * two.shape[1]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        assert not plot_curves(tmp_path / "none.png", _epochs(True), LOGS)
    assert "none.png is not drawn; run: pip install matplotlib" in caplog.text
    assert not (tmp_path / "none.png").exists()
