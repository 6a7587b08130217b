"""Ranks by tiles against `target_ranks` on the whole matrix, bit for bit."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_bituning.catalog import ItemTable
from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.evaluation import catalog_ranks
from peft_bituning.metrics import target_ranks


@dataclass(frozen=True)
class Case:
    users: Tensor
    table: ItemTable
    targets: list[int]
    seen: list[list[int]]

    def expected(self) -> tuple[list[float], list[float]]:
        scores = self.table.scores(self.users)
        return target_ranks(scores, self.targets).tolist(), target_ranks(scores, self.targets, self.seen).tolist()

    def found(self, max_scores: int) -> tuple[list[float], list[float]]:
        unfiltered, filtered = catalog_ranks(self.users, self.table, self.targets, self.seen, max_scores)
        return unfiltered.tolist(), filtered.tolist()


def random_case(num_rows: int, num_items: int, width: int, seed: int = 0) -> Case:
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    table = ItemTable.from_embeddings(torch.randn(num_items, width, generator=generator))
    return Case(
        torch.randn(num_rows, width, generator=generator),
        table,
        random.integers(0, num_items, num_rows).tolist(),
        [random.integers(0, num_items, random.integers(0, 9)).tolist() for _ in range(num_rows)],
    )


@st.composite
def tied_cases(draw) -> Case:
    """Any score matrix with many ties: a one-hot user's score is one number of the table."""
    num_rows, num_items = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    values = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 1e-40, 0.5, 1.0])
    scores = draw(
        st.lists(st.lists(values, min_size=num_rows, max_size=num_rows), min_size=num_items, max_size=num_items)
    )
    item = st.integers(0, num_items - 1)
    targets = draw(st.lists(item, min_size=num_rows, max_size=num_rows))
    seen = draw(st.lists(st.lists(item, max_size=6), min_size=num_rows, max_size=num_rows))
    return Case(torch.eye(num_rows), ItemTable(torch.tensor(scores)), targets, seen)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a tensor made inside, views of the table aside."""

    def __init__(self, table: ItemTable) -> None:
        super().__init__()
        self.storage = table.embeddings.untyped_storage().data_ptr()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.storage:
                self.elements = max(self.elements, tensor.numel())
        return result


@settings(deadline=None, max_examples=100)
@given(tied_cases(), st.integers(1, 250))
def test_any_tiles_give_the_ranks_of_the_whole_matrix(case: Case, max_scores: int) -> None:
    assert case.found(max_scores) == case.expected()


@pytest.mark.parametrize("max_scores", [7, 100, 1600, 4000, 40_000])
def test_cosines_are_ranked_as_a_whole(max_scores: int) -> None:
    case = random_case(60, 97, 8)
    assert case.found(max_scores) == case.expected()


def test_a_small_catalog_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(50, 40, 8)
    shapes = products(monkeypatch)
    case.found(2000)
    assert shapes == [(50, 40)]
    shapes.clear()
    case.found(1999)  # a row less at once, still each score once
    assert shapes == [(49, 40), (1, 40)]


def test_a_large_catalog_is_multiplied_again_only_where_targets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(20, 500, 8)
    case = Case(case.users, case.table, [450] * 19 + [30], case.seen)
    expected = case.expected()
    shapes = products(monkeypatch)
    assert case.found(20 * 100) == expected
    assert shapes == [(20, 100)] * 2 + [(20, 100)] * 5


def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shape of every block of scores."""
    shapes: list[tuple[int, ...]] = []
    scores = ItemTable.scores

    def recorded(self: ItemTable, users: Tensor) -> Tensor:
        block = scores(self, users)
        shapes.append(tuple(block.shape))
        return block

    monkeypatch.setattr(ItemTable, "scores", recorded)
    return shapes


def test_chunks_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(17, 640, 8)
    case = Case(case.users, case.table, [0] * 17, case.seen)
    shapes = products(monkeypatch)
    case.found(17 * 100)
    assert shapes == [(17, 92)] * 7 + [(17, 88)]


def test_a_target_is_no_rival_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the last bits of the second product."""
    case = random_case(17, 640, 8)
    expected = case.expected()
    scores = ItemTable.scores
    times = iter(range(1000))
    monkeypatch.setattr(ItemTable, "scores", lambda *given: scores(*given) * (1 + next(times) * 2**-23))
    assert case.found(17 * 100) == expected


@pytest.mark.parametrize("max_scores", [600, 10_000])
def test_no_more_scores_than_a_tile_are_held(max_scores: int) -> None:
    case = random_case(100, 400, 4)  # 40,000 scores
    with LargestTensor(case.table) as largest:
        case.found(max_scores)
    assert largest.elements <= max_scores
    with LargestTensor(case.table) as largest:
        case.expected()
    assert largest.elements == 40_000


def test_float16_users_are_ranked_in_float32() -> None:
    case = random_case(6, 30, 8)
    halved = Case(case.users.half(), case.table, case.targets, case.seen)
    assert halved.found(1000) == halved.expected()


def test_no_users_have_no_ranks() -> None:
    table = ItemTable(torch.eye(3))
    unfiltered, filtered = catalog_ranks(torch.zeros(0, 3), table, [], [])
    assert unfiltered.shape == filtered.shape == (0,)


@pytest.mark.parametrize("max_scores", [5, 100])
def test_nan_scores_are_refused(max_scores: int) -> None:
    case = random_case(6, 10, 4)
    case.users[[2, 4]] = torch.nan
    with pytest.raises(InputError, match=r"scores must not be NaN, got NaN in 2 of 6 rows, first in rows \[2, 4\]"):
        case.found(max_scores)
    case = random_case(6, 10, 4)
    case.table.embeddings[case.targets[0]] = torch.nan
    with pytest.raises(InputError, match="scores must not be NaN, got NaN in 6 of 6 rows"):
        case.found(max_scores)


def test_bad_input_is_named() -> None:
    table, users = ItemTable(torch.eye(3)), torch.eye(3)[:2]
    with pytest.raises(InputError, match="targets must have one entry for each of the 2 users, got 1"):
        catalog_ranks(users, table, [0], [[], []])
    with pytest.raises(InputError, match="seen must have one entry for each of the 2 users, got 0"):
        catalog_ranks(users, table, [0, 1], [])
    with pytest.raises(InputError, match=r"targets must be catalog indices from 0 to 2, got \[3\]"):
        catalog_ranks(users, table, [0, 3], [[], []])
    with pytest.raises(InputError, match=r"seen must be catalog indices from 0 to 2, got \[-1\]"):
        catalog_ranks(users, table, [0, 1], [[], [-1]])
    for max_scores in (0, 2**24 + 1):
        with pytest.raises(ConfigurationError, match=f"max_scores must be from 1 to 16777216, got {max_scores}"):
            catalog_ranks(users, table, [0, 1], [[], []], max_scores)
