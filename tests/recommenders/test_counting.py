"""Popularity and item-kNN against counts by hand and a dense matrix version."""

import numpy as np
import pytest
import torch

from peft_bituning.errors import ConfigurationError, DataError, InputError
from peft_bituning.recommenders import ItemKNN, Popularity, pad_histories

SEQUENCES = [[0, 1, 2], [1, 2, 1], [], [2, 3], [0, 1, 2, 3, 4]]


def dense_similarities(sequences, num_items):
    """Cosine of tf-idf rows, written with full matrices."""
    counts = np.zeros((num_items, len(sequences)))
    for user, sequence in enumerate(sequences):
        for item in sequence:
            counts[item, user] += 1
    weights = np.sqrt(counts) * np.maximum(np.log(num_items) - np.log1p((counts > 0).sum(0)), 0)
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    similarities = weights @ weights.T
    np.fill_diagonal(similarities, 0)
    return similarities


def test_popularity_counts_events():
    scores = Popularity(6).fit(SEQUENCES).scores(*pad_histories([[0], []]))
    assert scores.tolist() == [[2, 4, 4, 2, 1, 0]] * 2


def test_item_knn_equals_dense_matrices():
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 20, size=length).tolist() for length in generator.integers(0, 9, size=60)]
    similarities = dense_similarities(sequences, 20)
    model = ItemKNN(20, neighbors=20, decay=0.7).fit(sequences)
    histories = [[1, 2, 3], [4], [5, 5], []]
    scores = model.scores(*pad_histories(histories)).numpy()
    for row, history in enumerate(histories):
        expected = sum((0.7**age * similarities[item] for age, item in enumerate(reversed(history))), np.zeros(20))
        assert np.allclose(scores[row], expected, atol=1e-6)


def test_only_the_nearest_items_count():
    similarities = dense_similarities(SEQUENCES, 6)
    scores = ItemKNN(6, neighbors=2).fit(SEQUENCES).scores(*pad_histories([[0]]))[0].numpy()
    assert np.count_nonzero(scores) == 2
    assert np.allclose(sorted(scores)[-2:], sorted(similarities[0])[-2:], atol=1e-6)


def test_item_knn_skips_padding_and_new_items():
    model = ItemKNN(6).fit(SEQUENCES)
    expected = model.scores(torch.tensor([[0, 2]]), torch.ones(1, 2))
    padded = model.scores(torch.tensor([[-7, 0, 99, 2, 1]]), torch.tensor([[1, 1, 1, 1, 0]]))
    assert torch.equal(expected, padded)


def test_bad_input_is_named():
    for model in (Popularity(3), ItemKNN(3)):
        with pytest.raises(DataError, match=r"catalog indices \[3, 4\] outside 0 to 2"):
            model.fit([[0, 3], [4]])
    with pytest.raises(ConfigurationError, match="num_items must be at least 1, got 0"):
        Popularity(0)
    with pytest.raises(ConfigurationError, match="neighbors must be at least 1, got 0"):
        ItemKNN(3, neighbors=0)
    with pytest.raises(ConfigurationError, match=r"decay must be in \(0, 1\], got 0"):
        ItemKNN(3, decay=0)
    with pytest.raises(InputError, match="must both have shape"):
        ItemKNN(3).scores(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3))


def test_no_events_at_all():
    assert not ItemKNN(3).fit([[], []]).scores(*pad_histories([[1]])).any()
    assert not Popularity(3).fit([]).scores(*pad_histories([[1]])).any()
