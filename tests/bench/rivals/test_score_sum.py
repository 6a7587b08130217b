"""Sums of scores."""

import numpy as np
import pytest
import torch
from bench.rivals.score_sum import ScoreSum
from bench.rivals.text_similarity import TextSimilarity

from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.recommenders import ItemKNN, Popularity, pad_histories

SEQUENCES = [[0, 1, 2], [1, 2, 1], [], [2, 3], [0, 1, 2, 3, 4]]
VECTORS = np.random.default_rng(0).normal(size=(6, 4))


def test_item_knn_plus_four_times_text():
    knn, text = ItemKNN(6).fit(SEQUENCES), TextSimilarity(VECTORS)
    batch = pad_histories([[0, 1], [3], []])
    total = ScoreSum([(1.0, knn), (4.0, text)]).scores(*batch)
    assert torch.allclose(total, knn.scores(*batch) + 4 * text.scores(*batch))
    assert total[0, 5] != 0  # item 5 has no event and is reached by its text


def test_bad_parts_are_named():
    with pytest.raises(ConfigurationError, match="parts must be at least one pair of weight and recommender, got none"):
        ScoreSum([])
    with pytest.raises(InputError, match=r"all parts must score one catalog, got \[3, 4\] items"):
        ScoreSum([(1, Popularity(3)), (1, Popularity(4))]).scores(*pad_histories([[0]]))
