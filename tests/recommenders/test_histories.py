"""Histories as events against loops over the padded rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.errors import InputError
from peft_bituning.recommenders.histories import Cells, Histories

NUM_ITEMS = 7
ROWS = st.integers(0, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.tuples(st.integers(-3, NUM_ITEMS + 3), st.booleans()), min_size=width, max_size=width), max_size=5
    ).map(lambda rows: (rows, width))
)


def padded(rows: list[list[tuple[int, bool]]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices and the mask of rows of (index, is real)."""
    item_indices = torch.tensor([[item for item, _ in row] for row in rows], dtype=torch.long).reshape(len(rows), width)
    return item_indices, torch.tensor([[real for _, real in row] for row in rows]).bool().reshape(len(rows), width)


@settings(deadline=None, max_examples=30)
@given(ROWS)
def test_events_are_those_of_loops(drawn: tuple[list[list[tuple[int, bool]]], int]) -> None:
    histories = Histories(*padded(*drawn), NUM_ITEMS)
    lists = [[item for item, real in row if real and 0 <= item < NUM_ITEMS] for row in drawn[0]]
    assert histories.as_lists() == lists and len(histories) == len(lists)
    assert histories.rows.tolist() == [row for row, items in enumerate(lists) for _ in items]
    assert histories.items.tolist() == [item for items in lists for item in items]
    assert histories.ages.tolist() == [age for items in lists for age in reversed(range(len(items)))]
    seen = [(row, item) for row, items in enumerate(lists) for item in sorted(set(items))]
    assert list(zip(histories.seen.rows.tolist(), histories.seen.items.tolist(), strict=True)) == seen
    assert histories.seen.values.tolist() == [1.0] * len(seen)
    last = [(row, items[-1]) for row, items in enumerate(lists) if items]
    assert list(zip(histories.last.rows.tolist(), histories.last.items.tolist(), strict=True)) == last
    assert histories.last.values.tolist() == [1.0] * len(last)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, NUM_ITEMS - 1), st.floats(-9, 9, allow_subnormal=False)),
        max_size=20,
    )
)
def test_what_falls_on_one_cell_is_added_up(events: list[tuple[int, int, float]]) -> None:
    histories = Histories(torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1), NUM_ITEMS)
    rows, items = (np.array([event[place] for event in events], dtype=np.int64) for place in (0, 1))
    cells = histories.summed(rows, items, np.array([event[2] for event in events], dtype=np.float64))
    expected: dict[tuple[int, int], float] = {}
    for row, item, value in events:
        expected[row, item] = expected.get((row, item), 0.0) + value
    assert list(zip(cells.rows.tolist(), cells.items.tolist(), strict=True)) == sorted(expected)
    assert cells.values.tolist() == [expected[cell] for cell in sorted(expected)]  # the same order of adding, no less
    whole = histories.whole(cells)
    assert whole.shape == (4, NUM_ITEMS) and whole.dtype == np.float64
    for row in range(4):
        for item in range(NUM_ITEMS):
            assert whole[row, item] == expected.get((row, item), 0.0)


def test_a_mask_of_numbers_and_indices_of_32_bits() -> None:
    item_indices = torch.tensor([[6, 1, 2, 6]], dtype=torch.int32)
    for mask in (torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])):
        histories = Histories(item_indices, mask, NUM_ITEMS)
        assert histories.as_lists() == [[1, 6]] and histories.ages.tolist() == [1, 0]


def test_cells_of_large_catalogs_do_not_overflow() -> None:
    num_items = 2**31 - 1
    item_indices = torch.full((3, 1), num_items - 1, dtype=torch.int32)
    seen = Histories(item_indices, torch.ones(3, 1), num_items).seen
    assert seen.items.tolist() == [num_items - 1] * 3 and seen.rows.tolist() == [0, 1, 2]


def test_embeddings_are_kept() -> None:
    embeddings = torch.ones(1, 2)
    ones = torch.ones(1, 1, dtype=torch.long)
    assert Histories(ones, ones, 3, embeddings).embeddings is embeddings
    assert Histories(ones, ones, 3).embeddings is None


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((2, 3), (2, 4)), ((2, 3), (3, 3)), ((1, 2, 3), (1, 2, 3))])
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="must both have shape") as error:
        Histories(torch.zeros(shapes[0], dtype=torch.long), torch.ones(shapes[1]), 3)
    assert str(list(shapes[0])) in str(error.value) and str(list(shapes[1])) in str(error.value)


def test_cells_are_named() -> None:
    cells = Cells(np.array([0]), np.array([2]), np.array([1.5]))
    assert cells.rows[0] == 0 and cells.items[0] == 2 and cells.values[0] == 1.5
