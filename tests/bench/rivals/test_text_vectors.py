"""Models over frozen text vectors: how they are built, and what vectors they refuse."""

import numpy as np
import pytest
import torch
from bench.rivals.fdsa import FDSA
from bench.rivals.text_similarity import TextSimilarity
from bench.rivals.text_vectors import standardise
from bench.rivals.zesrec import ZESRec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.recommenders import load_recommender, pad_histories

VECTORS = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 8, "max_history_length": 6, "initializer_range": 0.3}
models = pytest.mark.parametrize("model_class", [ZESRec, FDSA])


@models
@pytest.mark.parametrize("given", [VECTORS, VECTORS.numpy(), VECTORS.tolist(), VECTORS.double()])
def test_vectors_may_come_in_any_form(model_class, given):
    assert torch.equal(model_class.from_vectors(given, **SMALL).text_vectors, VECTORS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3), r"must have shape \[items, width\], got \[3\]"),
        (torch.zeros(0, 3), r"got \[0, 3\]"),
        ([[1.0], ["x"]], r"must be an array \[items, width\] of real numbers"),
        (np.array([[1.0, 2.0], [np.nan, 0.0], [np.inf, 0.0]]), r"in 2 of 3 rows, first in rows \[1, 2\]; "),
    ],
)
def test_bad_vectors_are_named(given, message):
    for build in (ZESRec.from_vectors, TextSimilarity):
        with pytest.raises(InputError, match=message):
            build(given)


@models
def test_build_is_seeded_and_takes_sizes_from_the_vectors(model_class):
    state = torch.get_rng_state()
    one, same, other = (model_class.from_vectors(VECTORS, seed=seed, **SMALL) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.content_hash() == same.content_hash() != other.content_hash()
    assert one.num_items == 9 and one.config.text_size == 12 and one.embedding_dim == 8
    with pytest.raises(ConfigurationError, match="dropout must be in"):
        model_class.from_vectors(VECTORS, dropout=2.0)


@models
def test_the_vectors_are_saved_and_never_trained(model_class, tmp_path):
    model = model_class.from_vectors(VECTORS, **SMALL)
    assert not any("text_vectors" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    batch = pad_histories([[1, 2, 3], [4], []])
    upstream = model_class.from_pretrained(str(tmp_path), local_files_only=True)
    for loaded in (load_recommender(tmp_path), upstream):
        assert type(loaded) is model_class and torch.equal(loaded.text_vectors, VECTORS)
        assert loaded.content_hash() == model.content_hash()
        assert torch.equal(loaded.scores(*batch), model.scores(*batch))


@models
def test_the_vectors_are_copied(model_class):
    vectors = VECTORS.clone()
    model = model_class.from_vectors(vectors, **SMALL)
    vectors.zero_()
    assert torch.equal(model.text_vectors, VECTORS)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 30), st.integers(2, 6), st.integers(1, 7), st.floats(0.0, 50.0))
def test_a_standardised_norm_gives_mean_0_and_variance_1_over_the_catalog(items, width, chunk, common):
    generator = torch.Generator().manual_seed(items * 100 + width)
    vectors = torch.randn(items, width, generator=generator) + common * torch.randn(width, generator=generator)
    norm = nn.LayerNorm(width)
    standardise(norm, vectors.split(chunk))
    plain = functional.layer_norm(vectors, (width,), eps=norm.eps).double()
    out = norm(vectors).double()
    varied = plain.std(0, correction=0) > 2e-3
    assert torch.allclose(out.mean(0)[varied], torch.zeros(1).double(), atol=5e-2)
    assert torch.allclose(out.std(0, correction=0)[varied], torch.ones(1).double(), rtol=5e-2)
    assert out.isfinite().all()


def test_what_all_items_share_is_not_blown_up():
    norm = nn.LayerNorm(3)
    standardise(norm, [torch.tensor([[1.0, 2.0, 3.0]]).expand(5, 3)])
    assert norm.weight.max() <= 1000 and norm(torch.tensor([[1.0, 2.0, 3.0]])).abs().max() < 1e-2
