"""What made a list is told apart by everything that can change it."""

import json
from dataclasses import replace

import torch

from peft_bituning import LaserRecommender
from peft_bituning.batch.provenance import made_by
from peft_bituning.catalog import ExactIndex


class Approximate(ExactIndex):
    """An index with settings."""

    kind = "graph"

    def __init__(self, embeddings: torch.Tensor, neighbours: int) -> None:
        super().__init__(embeddings)
        self.parameters = {"neighbours": neighbours}


def test_made_by_tells_recommenders_apart(trained) -> None:
    before = made_by(trained.recommender)
    assert json.loads(json.dumps(before)) == before
    assert (before["base_model"], before["dtype"]) == ("tiny-llama", "torch.float32")
    again = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")
    assert made_by(again) == before
    again.add_items([{"item_id": "new1", "title": "Gold ladder", "brand": "Acme", "category": "tools"}])
    changed = {name for name, value in made_by(again).items() if value != before[name]}
    assert changed == {"catalog", "item_table"}
    again = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")
    again.settings = replace(again.settings, max_history=3)
    assert {name for name, value in made_by(again).items() if value != before[name]} == {"max_history"}
    half = LaserRecommender.from_pretrained(
        trained.folder, base_model=trained.base_folder, device="cpu", dtype=torch.bfloat16
    )
    assert made_by(half)["dtype"] == "torch.bfloat16"
    assert before["index"] == {"class": "ExactIndex"}
    half.index = Approximate(half.table.embeddings, 8)
    assert made_by(half)["index"] == {"class": "Approximate", "kind": "graph", "parameters": {"neighbours": 8}}
