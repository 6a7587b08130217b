"""FDSA-style: two streams, one of ids and one of text, side by side."""

import torch
from bench.rivals.fdsa import FDSA

from peft_bituning.recommenders import fit_recommender, pad_histories

VECTORS = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 8, "max_history_length": 6, "initializer_range": 0.3}


def build():
    return FDSA.from_vectors(VECTORS, **SMALL).eval()


def test_a_state_is_both_streams_states_put_together():
    model = build()
    history = torch.tensor([[3, 1, 4]])
    ids = model.encoder(input_ids=history).last_hidden_state
    features = model.text_projection(model.text_norm(VECTORS[history]))
    text = model.text_encoder(inputs_embeds=features).last_hidden_state
    weight, bias = model.fusion.weight, model.fusion.bias
    expected = ids @ weight[:, :8].T + text @ weight[:, 8:].T + bias
    states = model.encode(history, torch.ones(1, 3))
    assert torch.allclose(states, expected, atol=1e-5)
    assert torch.allclose(model.scores(history, torch.ones(1, 3))[0], expected[0, -1] @ model.item_weights.T, atol=1e-5)


def test_both_streams_matter_and_are_causal():
    model = build()
    history, mask = torch.tensor([[3, 1, 4]]), torch.ones(1, 3)
    states = model.encode(history, mask)
    changed = build()
    changed.text_vectors[4].neg_()  # only the last item's text
    moved = changed.encode(history, mask)
    assert torch.allclose(moved[0, :2], states[0, :2], atol=1e-6)
    assert not torch.allclose(moved[0, 2], states[0, 2], atol=1e-3)
    changed = build()
    with torch.no_grad():
        changed.item_weights[4].neg_()  # only its id
    moved = changed.encode(history, mask)
    assert torch.allclose(moved[0, :2], states[0, :2], atol=1e-6)
    assert not torch.allclose(moved[0, 2], states[0, 2], atol=1e-3)


def test_every_weight_is_trained():
    model = build().train()
    model.training_loss(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 3]), torch.Generator()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_cycle_is_learned():
    model = FDSA.from_vectors(VECTORS, hidden_size=16, dropout=0.0, attention_dropout=0.0)
    sequences = [[(start + step) % 9 for step in range(6)] for start in range(9)]
    report = fit_recommender(model, sequences, epochs=60, batch_size=9, learning_rate=5e-3)
    scores = model.scores(*pad_histories([row[:-1] for row in sequences]))
    assert scores.argmax(1).tolist() == [row[-1] for row in sequences]
    assert report.losses[-1] < report.losses[0] / 3
