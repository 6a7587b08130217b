"""Text without training against numpy."""

import numpy as np
import pytest
import torch
from bench.rivals.text_similarity import TextSimilarity
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.recommenders import pad_histories
from peft_bituning.recommenders.hybrid import Whitening

VECTORS = np.random.default_rng(0).normal(size=(7, 5)) + 3.0


def cosines(history, decay, centre):
    vectors = VECTORS - VECTORS.mean(0) if centre else VECTORS
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    user = sum((decay**age * unit[item] for age, item in enumerate(reversed(history))), np.zeros(5))
    return unit @ user / max(np.linalg.norm(user), 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=4), st.floats(0.1, 1.0), st.booleans())
def test_scores_equal_numpy(histories, decay, centre):
    scores = TextSimilarity(VECTORS, decay=decay, centre=centre).scores(*pad_histories(histories))
    expected = np.stack([cosines(history, decay, centre) for history in histories])
    assert scores.dtype == torch.float32 and np.allclose(scores.numpy(), expected, atol=1e-5)


def test_padding_holes_and_new_items_do_not_age_the_others():
    model = TextSimilarity(VECTORS)
    bare = model.scores(torch.tensor([[0, 2]]), torch.ones(1, 2))
    padded = model.scores(torch.tensor([[-7, 0, 99, 2, 1]]), torch.tensor([[1, 1, 1, 1, 0]]))
    assert torch.allclose(bare, padded)
    assert not model.scores(*pad_histories([[]])).any()


def test_bad_input_is_named():
    with pytest.raises(ConfigurationError, match=r"decay must be in \(0, 1\], got 0"):
        TextSimilarity(VECTORS, decay=0)
    with pytest.raises(InputError, match="must both have shape"):
        TextSimilarity(VECTORS).scores(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3))


def test_whitened_vectors_are_the_hybrids() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    white = Whitening.fit(vectors, 3.0)(vectors)
    found = TextSimilarity(vectors, shrinkage=3.0).scores(*pad_histories([[4]]))[0].numpy()
    assert np.allclose(found, white @ white[4], atol=1e-5)
