"""Vectors by item-kNN: their products are the best of their rank."""

import numpy as np
import pytest
import torch
from bench.rivals.knn_vectors import knn_item_vectors

from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import ItemKNN, pad_histories


def test_item_vectors_come_close_to_the_similarities():
    generator = np.random.default_rng(1)
    sequences = [generator.integers(0, 30, size=length).tolist() for length in generator.integers(2, 9, size=80)]
    alone = pad_histories([[item] for item in range(30)])
    both = np.eye(30) + ItemKNN(30, neighbors=30).fit(sequences).scores(*alone).numpy()
    values, vectors = np.linalg.eigh(both)  # ascending
    model = ItemKNN(30, neighbors=30).fit(sequences)
    for width in (5, 30):
        expected = vectors[:, -width:] * values[-width:] @ vectors[:, -width:].T  # the best of this rank
        found = knn_item_vectors(model, width)
        assert found.shape == (30, width) and found.dtype == np.float32
        assert np.allclose(found @ found.T, expected, atol=1e-4)
    state = torch.get_rng_state()
    assert np.array_equal(found, knn_item_vectors(model, 30)) and torch.equal(state, torch.get_rng_state())
    for width in (0, 31):
        with pytest.raises(ConfigurationError, match=f"width must be from 1 to the number of items 30, got {width}"):
            knn_item_vectors(model, width)
