"""BERT4Rec: bidirectional encoding, the appended mask token, and what is hidden in training."""

import pytest
import torch

from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import BERT4RecConfig, build_recommender


def build(**settings):
    return build_recommender(
        "bert4rec", 9, **{"hidden_size": 8, "max_history_length": 6, "initializer_range": 0.5, **settings}
    ).eval()


def test_a_position_sees_both_sides():
    model = build()
    states = model.encode(torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    changed = model.encode(torch.tensor([[0, 1, 5]]), torch.ones(1, 3))
    assert not torch.allclose(states[:, 0], changed[:, 0], atol=1e-3)


def test_scores_read_a_mask_token_after_the_history():
    model = build()
    tokens = torch.tensor([[3, 1, 9]])  # 9 = the mask token of nine items
    states = model.encoder(input_ids=tokens, position_ids=torch.tensor([[2, 1, 0]])).last_hidden_state[:, -1]
    expected = model.transform(states) @ model.item_weights.T + model.item_bias
    assert torch.allclose(model.scores(torch.tensor([[3, 1]]), torch.ones(1, 2)), expected, atol=1e-5)


def test_a_full_history_leaves_room_for_the_mask_token():
    model = build()
    assert model.scores(torch.arange(6)[None], torch.ones(1, 6)).isfinite().all()


def test_hidden_items_are_real_ones_and_the_last_alone_or_a_share():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 5, 9] * 400)
    inside = torch.arange(9) < lengths[:, None]
    hidden = build(last_item_probability=0.0, mask_probability=0.4)._choose_hidden(lengths, 9, generator)
    assert not hidden[~inside].any()
    assert hidden.any(1).all()
    assert hidden[lengths == 9].float().mean().item() == pytest.approx(0.4, abs=0.03)
    last = build(last_item_probability=1.0)._choose_hidden(lengths, 9, generator)
    assert torch.equal(last.nonzero()[:, 1], lengths - 1)
    mixed = build(last_item_probability=0.5, mask_probability=0.01)._choose_hidden(lengths, 9, generator)
    only_last = mixed[torch.arange(1200), lengths - 1].float().mean().item()
    assert 0.5 < only_last < 0.75  # the half that hides the last alone, and those where chance chose it


def test_rows_are_cut_to_two_items_or_more():
    lengths = torch.tensor([2, 3, 9] * 400)
    generator = torch.Generator().manual_seed(0)
    cut = build(cut_probability=0.5)._choose_lengths(lengths, generator)
    assert (cut >= 2).all() and (cut <= lengths).all()
    # half the rows are cut, and of these one in eight keeps its nine items
    assert (cut[lengths == 9] < 9).float().mean().item() == pytest.approx(0.5 * 7 / 8, abs=0.08)
    assert set(cut[lengths == 9].tolist()) == set(range(2, 10))
    assert torch.equal(build(cut_probability=0.0)._choose_lengths(lengths, generator), lengths)


def test_loss_depends_on_the_generator_alone():
    model = build(last_item_probability=0.0)
    rows, lengths = torch.randint(0, 9, (8, 6), generator=torch.Generator().manual_seed(0)), torch.full((8,), 6)
    losses = [model.training_loss(rows, lengths, torch.Generator().manual_seed(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_probability": 0.0}, r"mask_probability must be in \(0, 1\), got 0.0"),
        ({"cut_probability": -0.5}, r"cut_probability must be in \[0, 1\], got -0.5"),
        ({"last_item_probability": 1.5}, r"last_item_probability must be in \[0, 1\], got 1.5"),
    ],
)
def test_config_ranges_are_checked(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        BERT4RecConfig(num_items=9, **settings)
