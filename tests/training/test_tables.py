"""Item tables of large catalogs: blocks beside the checkpoints, the same training as in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_bituning.base_models import BaseModel
from peft_bituning.catalog import HistoryEncoder, item_tables, table_blocks
from peft_bituning.serving import LaserRecommender

Train = Callable[..., LaserRecommender]
TWO: dict[str, Any] = {"stage1_epochs": 2, "stage2_epochs": 1}


def make_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ten items be a large catalog, of blocks of four."""
    monkeypatch.setattr(item_tables, "LARGE_CATALOG", 9)
    monkeypatch.setattr(item_tables, "table_blocks", lambda folder, items, run: table_blocks(folder, items, run, 4))


def _log(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "results.json").read_text())["log_history"]


def test_the_same_training(
    train: Train, tiny_base: Callable[[], BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", **TWO)
    make_large(monkeypatch)
    mapped = train("mapped", **TWO)
    torch.testing.assert_close(mapped.table.embeddings, whole.table.embeddings, atol=1e-4, rtol=0)
    for one, two in zip(_log(tmp_path / "whole"), _log(tmp_path / "mapped"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert not (tmp_path / "mapped" / "checkpoints").exists()
    again = LaserRecommender.from_pretrained(tmp_path / "mapped", base_model=tiny_base())
    assert torch.equal(again.table.embeddings, mapped.table.embeddings)


@pytest.mark.parametrize("large", [False, True])
def test_users_and_items_are_centered_alike(
    train: Train, tiny_base: Callable[[], BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """By the mean over the catalog; over every second item of a large one. New items too, and after loading."""
    if large:
        make_large(monkeypatch)
    train("out", {"center_embeddings": True}, **TWO)
    found = LaserRecommender.from_pretrained(tmp_path / "out", base_model=tiny_base())
    items = found.encode_items()
    np.testing.assert_allclose(items[:: 2 if large else 1].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(found.encode_items(normalize_embeddings=True), found.table.embeddings, atol=1e-5)
    centers = {name: value for name, value in found.model.state_dict().items() if "bituning_center" in name}
    user_center, item_center = centers.values()
    assert torch.equal(user_center, item_center) and 0.1 < float(item_center.norm()) < 1
    found.add_items([{"item_id": "new", "title": "a lamp"}])
    for embeddings in (found.encode_items(), found.encode_users([[], ["new"]])):
        np.testing.assert_allclose(np.linalg.norm(embeddings + item_center.numpy(), axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found.encode_items(["new"], normalize_embeddings=True)[0], found.table.embeddings[-1])


def test_interrupted_within_encoding(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was encoded before the interruption is not encoded again."""
    make_large(monkeypatch)
    encoded: list[int] = []
    encode = HistoryEncoder.encode

    def counted(self: HistoryEncoder, histories: Any, kind: str = "user", *rest: Any, **named: Any) -> Any:
        if kind == "item":
            if len(encoded) == 4:  # the second table, after one of its blocks
                raise KeyboardInterrupt
            encoded.append(len(histories))
        return encode(self, histories, kind, *rest, **named)

    monkeypatch.setattr(HistoryEncoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert encoded == [4, 4, 2, 4]
    encoded.append(0)
    train(resume=True)
    assert encoded[5:7] == [4, 2]  # the first table is there, and the second's first block
