"""SASRec: causality and its loss written out."""

import pytest
import torch
from torch.nn import functional

from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import SASRecConfig, build_recommender


def build(**settings):
    return build_recommender(
        "sasrec", 9, **{"hidden_size": 8, "max_history_length": 6, "initializer_range": 0.5, **settings}
    ).eval()


def test_a_position_does_not_see_later_ones():
    model = build()
    history = torch.tensor([[0, 1, 2, 3, 4]])
    states = model.encode(history, torch.ones(1, 5))
    for position in range(4):
        changed = history.clone()
        changed[0, position + 1 :] = 8
        others = model.encode(changed, torch.ones(1, 5))
        assert torch.allclose(others[:, : position + 1], states[:, : position + 1], atol=1e-6)
        assert not torch.allclose(others[:, position + 1 :], states[:, position + 1 :], atol=1e-3)
        cut = model.encode(history[:, : position + 1], torch.ones(1, position + 1))
        assert torch.allclose(cut, states[:, : position + 1], atol=1e-6)


def test_scores_are_the_last_state_times_the_item_embeddings():
    model = build()
    history, mask = torch.tensor([[7, 1, 2, 7]]), torch.tensor([[0, 1, 1, 0]])
    expected = model.encode(history, mask)[0, 2] @ model.item_weights.T
    assert torch.allclose(model.scores(history, mask)[0], expected)


def test_an_empty_history_scores_all_items_alike():
    assert not build().scores(torch.tensor([[3]]), torch.tensor([[0]])).any()


def test_loss_is_the_mean_cross_entropy_over_all_next_items():
    model = build()
    rows, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2])
    losses = []
    for row, length in zip(rows, lengths, strict=True):
        for cut in range(1, int(length)):
            scores = model.scores(row[None, :cut], torch.ones(1, cut))
            losses.append(functional.cross_entropy(scores, row[cut : cut + 1]))
    loss = model.training_loss(rows, lengths, torch.Generator())
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-6)
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"max_history_length": 0}, "max_history_length must be at least 1, got 0"),
        ({"max_length": 20}, "use max_history_length"),
        ({"hidden_size": 9}, r"hidden_size must be a multiple of num_attention_heads \(2\), got 9"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_config_ranges_are_checked(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        SASRecConfig(**settings)
