"""ZESRec-style: the embedding of an item is its projected text."""

import numpy as np
import torch
from bench.rivals.zesrec import ZESRec

from peft_bituning.recommenders import fit_recommender, pad_histories

VECTORS = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 8, "max_history_length": 6, "initializer_range": 0.3}


def test_item_embeddings_are_the_projected_text():
    model = ZESRec.from_vectors(VECTORS, **SMALL)
    vectors = VECTORS.double().numpy()
    centred = vectors - vectors.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    normed = (normed - normed.mean(0)) / normed.std(0)  # as the norm starts
    weight, bias = (tensor.detach().numpy() for tensor in (model.projection.weight, model.projection.bias))
    assert np.allclose(model.item_weights.numpy(), normed @ weight.T + bias, atol=1e-5)


def test_items_of_one_text_are_one_item():
    model = ZESRec.from_vectors(torch.cat([VECTORS, VECTORS[:1]]), **SMALL)
    scores = model.scores(*pad_histories([[0, 2], [9, 2]]))
    assert torch.allclose(scores[0], scores[1], atol=1e-6) and torch.allclose(scores[:, 0], scores[:, 9], atol=1e-6)


def test_every_weight_is_trained():
    model = ZESRec.from_vectors(VECTORS, **SMALL)
    model.training_loss(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 3]), torch.Generator()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_item_never_trained_on_is_found_by_its_text():
    """Kinds follow each other; item 8 is of kind 0 by its text and occurs in no sequence."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    vectors = torch.randn(4, 12, generator=generator)[kinds] + 0.2 * torch.randn(9, 12, generator=generator)
    model = ZESRec.from_vectors(vectors, hidden_size=16, dropout=0.0, attention_dropout=0.0)
    sequences = [[(start + step) % 8 for step in range(6)] for start in range(8)]
    fit_recommender(model, sequences, epochs=40, batch_size=8, learning_rate=5e-3)
    scores = model.scores(*pad_histories([[1, 2, 3], [5, 6, 7], [2, 3]]))
    assert all(int((row > row[8]).sum()) < 3 for row in scores)
    assert int((model.scores(*pad_histories([[0]]))[0] > model.scores(*pad_histories([[0]]))[0, 8]).sum()) >= 2
