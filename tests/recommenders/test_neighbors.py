"""Neighbor lists against loops over all pairs of items."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from peft_bituning.data.collator import pad_histories
from peft_bituning.errors import ArtifactError
from peft_bituning.recommenders import neighbors
from peft_bituning.recommenders.histories import Histories
from peft_bituning.recommenders.neighbors import NeighborLists

NUM_ITEMS = 9


def whole_numbers(seed: int, rows: int = NUM_ITEMS, width: int = 4) -> np.ndarray:
    """Return small whole numbers, half of them 0: many ties, and products that are 0 or below."""
    generator = np.random.default_rng(seed)
    return generator.integers(-2, 4, (rows, width)) * generator.integers(0, 2, (rows, width)).astype(np.float64)


def nearest(rows: np.ndarray, others: np.ndarray, number: int, itself: bool) -> list[list[tuple[int, float]]]:
    """Return each row's nearest: highest product first, then lowest index; none that is not above 0."""
    found = []
    for place, row in enumerate(rows):
        pairs = [(other, float(row @ vector)) for other, vector in enumerate(others) if itself or other != place]
        found.append(sorted((pair for pair in pairs if pair[1] > 0), key=lambda pair: (-pair[1], pair[0]))[:number])
    return found


def random_lists(seed: int, number: int = 3) -> NeighborLists:
    """Return sorted lists whose ends may be empty."""
    generator = np.random.default_rng(seed)
    items = np.stack([generator.permutation(NUM_ITEMS)[:number] for _ in range(NUM_ITEMS)])
    similarities = -np.sort(-generator.random((NUM_ITEMS, number)).round(1), axis=1)
    return NeighborLists(items.astype(np.int32), similarities.astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 12), st.booleans())
def test_the_nearest_are_those_of_loops(seed: int, number: int, itself: bool) -> None:
    vectors = whole_numbers(seed)
    lists = NeighborLists.nearest(csr_array(vectors), csr_array(vectors), number, itself)
    assert len(lists) == NUM_ITEMS and lists.items.shape == lists.similarities.shape == (NUM_ITEMS, number)
    assert lists.items.dtype == np.int32 and lists.similarities.dtype == np.float32
    for row, expected in enumerate(nearest(vectors, vectors, number, itself)):
        assert lists.items[row, : len(expected)].tolist() == [item for item, _ in expected]
        assert lists.similarities[row].tolist() == [value for _, value in expected] + [0.0] * (number - len(expected))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.booleans())
def test_many_rows_are_read_in_pieces(seed: int, itself: bool) -> None:
    vectors = csr_array(whole_numbers(seed))
    at_once = NeighborLists.nearest(vectors, vectors, 4, itself)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "ROWS_AT_ONCE", 2)
        in_pieces = NeighborLists.nearest(vectors, vectors, 4, itself)
    assert np.array_equal(at_once.items, in_pieces.items)
    assert np.array_equal(at_once.similarities, in_pieces.similarities)


def test_rows_among_others() -> None:
    rows, others = whole_numbers(1, 3), whole_numbers(2, 6)
    lists = NeighborLists.nearest(csr_array(rows), csr_array(others), 5)
    assert lists.items.shape == (3, 5)
    for row, expected in enumerate(nearest(rows, others, 5, itself=True)):
        assert lists.items[row, : len(expected)].tolist() == [item for item, _ in expected]
        assert lists.similarities[row, : len(expected)].tolist() == [value for _, value in expected]


def test_vectors_of_nothing_have_no_neighbors() -> None:
    empty = csr_array((4, 3))
    lists = NeighborLists.nearest(empty, empty, 2)
    assert not lists.items.any() and not lists.similarities.any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=5), min_size=1, max_size=4))
def test_scores_are_those_of_loops(seed: int, rows: list[list[int]]) -> None:
    lists = random_lists(seed)
    histories = Histories(*pad_histories(rows), NUM_ITEMS)
    weights = np.random.default_rng(seed).normal(size=sum(map(len, rows)))
    cells = lists.scores(histories, weights)
    expected, event = np.zeros((len(rows), NUM_ITEMS)), 0
    for row, history in enumerate(rows):
        for item in history:
            for near, similarity in zip(lists.items[item], lists.similarities[item], strict=True):
                expected[row, near] += weights[event] * float(similarity)
            event += 1
    assert np.allclose(histories.whole(cells), expected, rtol=0, atol=1e-12)
    places = list(zip(cells.rows.tolist(), cells.items.tolist(), strict=True))
    assert places == sorted(set(places))
    assert set(places) >= set(zip(*(axis.tolist() for axis in np.nonzero(expected)), strict=True))
    touched = {
        (row, int(near))
        for row, history in enumerate(rows)
        for item in history
        for near, similarity in zip(lists.items[item], lists.similarities[item], strict=True)
        if similarity
    }
    assert set(places) <= touched  # what fills the ends of lists is no neighbor


def test_a_grown_catalog() -> None:
    lists = random_lists(0)
    grown = lists.padded(NUM_ITEMS + 2)
    assert len(grown) == NUM_ITEMS + 2 and grown.items.dtype == np.int32 and grown.similarities.dtype == np.float32
    assert np.array_equal(grown.items[:NUM_ITEMS], lists.items)
    assert np.array_equal(grown.similarities[:NUM_ITEMS], lists.similarities)
    assert not grown.similarities[NUM_ITEMS:].any()


@pytest.mark.parametrize("number", [1, 3, 5])
def test_lists_of_another_length(number: int) -> None:
    lists = random_lists(0)
    other = lists.resized(number)
    assert other.items.shape == other.similarities.shape == (NUM_ITEMS, number)
    both = min(number, 3)
    assert np.array_equal(other.items[:, :both], lists.items[:, :both])
    assert np.array_equal(other.similarities[:, :both], lists.similarities[:, :both])
    assert not other.similarities[:, both:].any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 4))
def test_nearer_items_are_taken_in(seed: int, more: int) -> None:
    lists = random_lists(seed)
    generator = np.random.default_rng(seed + 1)
    items = generator.integers(NUM_ITEMS, 2 * NUM_ITEMS, (NUM_ITEMS, more)).astype(np.int32)
    similarities = generator.random((NUM_ITEMS, more)).round(1).astype(np.float32)
    joined = lists.joined(items, similarities)
    assert joined.items.shape == joined.similarities.shape == (NUM_ITEMS, 3) and joined.similarities.dtype == np.float32
    for row in range(NUM_ITEMS):
        pairs = [
            *zip(lists.similarities[row].tolist(), lists.items[row].tolist(), strict=True),
            *zip(similarities[row].tolist(), items[row].tolist(), strict=True),
        ]
        expected = sorted(pairs, key=lambda pair: -pair[0])[:3]  # stable: who was there stays before who is as near
        assert joined.items[row].tolist() == [item for _, item in expected]
        assert joined.similarities[row].tolist() == [value for value, _ in expected]


def test_tensors_and_back() -> None:
    lists = random_lists(4)
    tensors = lists.tensors()
    assert tensors["items"].dtype == torch.int32
    again = NeighborLists.of(tensors, NUM_ITEMS)
    assert np.array_equal(again.items, lists.items) and np.array_equal(again.similarities, lists.similarities)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": None}, "must be items and similarities"),
        ({"similarities": None}, "must be items and similarities"),
        ({"items": torch.zeros(NUM_ITEMS, 2, dtype=torch.int32)}, "must be items and similarities"),
        ({"items": torch.zeros(3), "similarities": torch.zeros(3)}, "must be items and similarities"),
        (
            {"items": torch.zeros(3, 2, dtype=torch.int32), "similarities": torch.zeros(3, 2)},
            rf"\[{NUM_ITEMS}, n\], got \[3, 2\]",
        ),
        ({"items": torch.full((NUM_ITEMS, 3), NUM_ITEMS)}, "must name items of the catalog"),
        ({"items": torch.full((NUM_ITEMS, 3), -1)}, "must name items of the catalog"),
        ({"similarities": torch.full((NUM_ITEMS, 3), torch.nan)}, "be finite"),
        ({"similarities": torch.full((NUM_ITEMS, 3), torch.inf)}, "be finite"),
    ],
)
def test_tensors_that_are_no_lists_are_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {**random_lists(0).tensors(), **change}
    with pytest.raises(ArtifactError, match=message):
        NeighborLists.of({name: tensor for name, tensor in tensors.items() if tensor is not None}, NUM_ITEMS)
