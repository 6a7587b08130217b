"""Ranking with the model at hand: the ranks of the whole score matrix, which is never made."""

import pytest
import torch
from torch import Tensor

from peft_bituning.catalog import ItemTable
from peft_bituning.data import LeaveOneOut
from peft_bituning.evaluation import rank_users
from peft_bituning.evaluation.catalog_ranks import MAX_SCORES
from peft_bituning.metrics import target_ranks


@pytest.fixture(scope="module")
def samples(trained):
    return LeaveOneOut(trained.data.histories).samples("test")


@pytest.mark.parametrize("num_items", [12, 700_000])
def test_ranks_are_those_of_the_whole_matrix(trained, samples, num_items, monkeypatch) -> None:
    encoder, table = trained.recommender.encoder, trained.recommender.table
    if num_items > len(table):
        generator = torch.Generator().manual_seed(0)
        others = torch.rand(num_items - len(table), table.embeddings.shape[1], generator=generator)
        table = table.extended(others - 0.5)
    histories, targets = [sample.history for sample in samples], [sample.target for sample in samples]
    held = []
    scores = ItemTable.scores

    def recorded(self: ItemTable, users: Tensor) -> Tensor:
        block = scores(self, users)
        held.append(block.numel())
        return block

    monkeypatch.setattr(ItemTable, "scores", recorded)
    report = rank_users(encoder, samples, table)
    monkeypatch.undo()
    assert sum(held) == len(samples) * num_items
    assert max(held) <= MAX_SCORES
    assert (len(held) > 1) == (len(samples) * num_items > MAX_SCORES)
    users = encoder.encode(histories)
    for first in range(0, len(samples), 10):
        ten = slice(first, first + 10)
        whole = table.scores(users)[ten] if num_items == 12 else table.scores(users[ten])
        tolerance = 0 if num_items == 12 else 5  # another shape of product may swap neighbours
        for found, seen in ((report.ranks_unfiltered, None), (report.ranks_filtered, histories[ten])):
            assert found[ten] == pytest.approx(target_ranks(whole, targets[ten], seen), abs=tolerance)
