"""Layout of histories: padding sides, holes, new items, long histories, batch mates; hashes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.errors import InputError
from peft_bituning.recommenders import Precomputed, build_recommender, pack_histories, pad_histories

NUM_ITEMS = 11
SMALL = {"hidden_size": 8, "max_history_length": 6}
TABLE = torch.randn(NUM_ITEMS, 8, generator=torch.Generator().manual_seed(0))


def build(kind, **settings):
    if kind == "precomputed":
        return Precomputed(TABLE, max_length=6)
    model = build_recommender(kind, NUM_ITEMS, seed=1, **{**SMALL, **settings})
    with torch.no_grad():  # weights of 0.02 would hide differences in their smallness
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.shape[0]))
    return model


MODELS = {kind: build(kind) for kind in ("sasrec", "bert4rec", "precomputed")}
kinds = pytest.mark.parametrize("kind", MODELS)


@kinds
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_layout_does_not_matter(kind, data):
    """Any placement of the items among padding, whatever the padding holds, gives the states of the bare history."""
    model = MODELS[kind]
    history = data.draw(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=6))
    width = len(history) + data.draw(st.integers(0, 5))
    columns = sorted(data.draw(st.permutations(range(width)))[: len(history)])
    junk = data.draw(st.lists(st.integers(-(2**62), 2**62), min_size=width, max_size=width))
    bare = model.encode(torch.tensor([history]), torch.ones(1, len(history)))
    item_indices = torch.tensor([junk])
    item_indices[0, columns] = torch.tensor(history)
    mask = torch.zeros(1, width, dtype=torch.long)
    mask[0, columns] = 1
    states = model.encode(item_indices, mask)
    assert torch.allclose(states[0, columns], bare[0], atol=1e-5)
    assert not states[mask == 0].any()
    bare_scores = model.scores(torch.tensor([history]), torch.ones(1, len(history)))
    assert torch.allclose(model.scores(item_indices, mask), bare_scores, atol=1e-5)


@kinds
def test_batch_mates_do_not_matter(kind):
    model = MODELS[kind]
    histories = [[1], [2, 3, 4], [], [5, 6, 7, 8, 9, 10], [3, 3]]
    item_indices, mask = pad_histories(histories)
    states, scores = model.encode(item_indices, mask), model.scores(item_indices, mask)
    assert states.shape == (5, 6, 8) and states.dtype == torch.float32
    assert scores.shape == (5, NUM_ITEMS) and scores.dtype == torch.float32
    for row, history in enumerate(histories):
        alone = pad_histories([history])
        assert torch.allclose(states[row, : len(history)], model.encode(*alone)[0, : len(history)], atol=1e-5)
        assert torch.allclose(scores[row], model.scores(*alone)[0], atol=1e-5)


@kinds
def test_new_items_count_as_masked(kind):
    model = MODELS[kind]
    with_new = model.encode(torch.tensor([[4, NUM_ITEMS, 2, -1, 7]]), torch.ones(1, 5, dtype=torch.bool))
    without = model.encode(torch.tensor([[4, 2, 7]]), torch.ones(1, 3, dtype=torch.bool))
    assert torch.allclose(with_new[:, [0, 2, 4]], without, atol=1e-5)
    assert not with_new[:, [1, 3]].any()


@kinds
def test_long_histories_keep_their_last_items(kind):
    model = MODELS[kind]
    item_indices = torch.arange(10)[None]
    mask = torch.ones(1, 10, dtype=torch.bool)
    states = model.encode(item_indices, mask)
    assert torch.allclose(states[:, 4:], model.encode(item_indices[:, 4:], mask[:, 4:]), atol=1e-5)
    assert not states[:, :4].any()
    assert model.encoded_mask(item_indices, mask)[0].tolist() == [False] * 4 + [True] * 6
    assert torch.allclose(model.scores(item_indices, mask), model.scores(item_indices[:, 4:], mask[:, 4:]), atol=1e-5)


@kinds
def test_encode_is_frozen_and_leaves_the_mode(kind):
    model = build(kind, **({} if kind == "precomputed" else {"dropout": 0.5}))
    item_indices, mask = pad_histories([[1, 2, 3]])
    model.train()
    first = model.encode(item_indices, mask)
    assert torch.equal(first, model.encode(item_indices, mask))
    assert torch.equal(model.scores(item_indices, mask), model.scores(item_indices, mask))
    assert model.training and not first.requires_grad
    assert model.num_items == NUM_ITEMS and model.embedding_dim == 8 and model.max_length == 6


@kinds
def test_rows_without_any_item(kind):
    model = MODELS[kind]
    item_indices, mask = torch.full((2, 3), 99), torch.zeros(2, 3, dtype=torch.bool)
    assert not model.encode(item_indices, mask).any()
    scores = model.scores(item_indices, mask)
    assert scores.isfinite().all() and torch.equal(scores[0], scores[1])


@kinds
def test_items_by_what_they_are_scored_by(kind):
    """The item's own weights times one number, as long on average as states; masked and new items are zero."""
    model = MODELS[kind]
    item_indices = torch.tensor([[3, 1, 3, 99], [7, 0, 2, 5]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    vectors = model.encode_items(item_indices, mask)
    states = model.encode(torch.arange(NUM_ITEMS)[:, None], torch.ones(NUM_ITEMS, 1))
    weights = model.item_weights.detach()
    scale = states.norm(dim=-1).mean() / weights.norm(dim=-1).mean()
    expected = torch.zeros(2, 4, 8)
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]:
        expected[row, column] = scale * weights[item_indices[row, column]]
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    assert not vectors.requires_grad and vectors.dtype == torch.float32
    assert not model.encode_items(torch.tensor([[99]]), torch.ones(1, 1)).any()


@kinds
def test_bad_shapes_and_types_are_named(kind):
    model = MODELS[kind]
    for call in (model.encode, model.scores):
        with pytest.raises(
            InputError, match=r"must both have shape \[rows, history length\], got \[2, 3\] and \[2, 2\]"
        ):
            call(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 2))
        with pytest.raises(InputError, match="item_indices must be integers"):
            call(torch.zeros(2, 3), torch.ones(2, 3))


def test_states_that_are_not_finite_are_named_by_row():
    model = build("sasrec")
    with torch.no_grad():
        model.item_weights[5] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinity in 1 of 3 rows, first in rows \[1\]"):
        model.encode(*pad_histories([[1, 2], [5], [3]]))


def test_content_hash_follows_weights_and_settings():
    hashes = {build(kind).content_hash() for kind in MODELS}
    assert len(hashes) == 3 and all(len(value) == 64 for value in hashes)
    model = build("sasrec")
    before = model.content_hash()
    assert before == build("sasrec").content_hash() == build("sasrec", dropout=0.0).content_hash()
    assert before != build("sasrec", num_attention_heads=4).content_hash()  # same tensors, other meaning
    assert before != build("sasrec", max_history_length=7).content_hash()
    with torch.no_grad():
        model.item_weights[3, 2] += 1e-6
    assert model.content_hash() != before


def test_pack_and_pad():
    packed, lengths = pack_histories(
        torch.tensor([[9, 1, 9, 2], [9, 9, 9, 9]]), torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    )
    assert packed.tolist() == [[1, 2], [0, 0]] and lengths.tolist() == [2, 0]
    item_indices, mask = pad_histories([[1, 2, 3], [], [4]], max_length=2)
    assert item_indices.tolist() == [[2, 3], [0, 0], [4, 0]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert pad_histories([[]])[0].shape == (1, 1)
