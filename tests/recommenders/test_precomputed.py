"""A table of embeddings made elsewhere."""

import numpy as np
import pytest
import torch

from peft_bituning.errors import ArtifactError, InputError
from peft_bituning.recommenders import Precomputed, load_recommender

TABLE = np.arange(12, dtype=np.float64).reshape(4, 3)


def test_states_are_rows_and_scores_the_mean_row_times_the_table():
    model = Precomputed(TABLE)
    history, mask = torch.tensor([[2, 0, 1]]), torch.tensor([[1, 0, 1]])
    assert model.encode(history, mask)[0].tolist() == [TABLE[2].tolist(), [0, 0, 0], TABLE[1].tolist()]
    assert model.scores(history, mask)[0].tolist() == pytest.approx((TABLE @ (TABLE[2] + TABLE[1]) / 2).tolist())
    assert model.num_items == 4 and model.embedding_dim == 3 and model.max_length == 50


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, np.ndarray.tolist, np.float16])
def test_any_array_will_do(make):
    assert torch.equal(Precomputed(make(TABLE)).embeddings, torch.from_numpy(TABLE).float())


def test_the_table_is_a_copy():
    source = torch.zeros(2, 2)
    model = Precomputed(source)
    source += 1
    assert not model.embeddings.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(value):
    table = TABLE.copy()
    table[[1, 3], 0] = value
    with pytest.raises(InputError, match=r"NaN or infinity in 2 of 4 rows, first in rows \[1, 3\]"):
        Precomputed(table)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([1.0, 2.0], r"shape \[items, width\], got \[2\]"),
        ([[1.0], [1.0, 2.0]], "real numbers"),
        ([["a"]], "real numbers"),
    ],
)
def test_bad_arrays_are_named(embeddings, message):
    with pytest.raises(InputError, match=message):
        Precomputed(embeddings)
    with pytest.raises(InputError, match="max_length must be at least 1"):
        Precomputed(TABLE, max_length=0)


def test_round_trip(tmp_path):
    model = Precomputed(np.random.default_rng(0).normal(size=(5, 3)), max_length=7)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = load_recommender(tmp_path / "new" / "folder")
    assert isinstance(loaded, Precomputed) and loaded.max_length == 7
    assert loaded.content_hash() == model.content_hash()
    (tmp_path / "new" / "folder" / "config.json").write_text('{"model_type": "precomputed"}')
    with pytest.raises(ArtifactError, match="does not describe a table"):
        load_recommender(tmp_path / "new" / "folder")
