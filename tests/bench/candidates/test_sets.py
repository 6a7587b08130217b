"""Candidates hold what they should and nothing else."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bench.candidates import Retriever
from bench.candidates.sets import CandidateSet, draw_candidates
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.data import LeaveOneOut
from peft_bituning.data.samples import Sample
from peft_bituning.errors import ConfigurationError, DataError

ITEMS = st.integers(0, 29)
SAMPLES = st.lists(st.tuples(st.lists(ITEMS, min_size=1, max_size=8), ITEMS), min_size=1, max_size=5)


def samples_of(rows: list[tuple[list[int], int]]) -> list[Sample]:
    return [Sample(user, tuple(history), target) for user, (history, target) in enumerate(rows)]


@settings(deadline=None, max_examples=60)
@given(rows=SAMPLES, size=st.integers(2, 12), seed=st.integers(0, 9))
def test_the_target_once_and_nothing_seen(rows: Any, size: int, seed: int) -> None:
    """Bought again, the target is still a candidate; items 0 and 10, 1 and 11, ... up to 4 share their names."""
    names = [f"name {item if item >= 15 else item % 10}" for item in range(30)]
    samples = samples_of(rows)
    drawn = draw_candidates(samples, names, size, str(seed))
    for sample, each in zip(samples, drawn, strict=True):
        assert (each.user, each.history, each.target) == (sample.user, sample.history, sample.target)
        assert len(each.items) == len(set(each.items)) == size
        assert each.items.count(sample.target) == 1 and each.items[each.place or 0] == sample.target
        assert not set(each.items) - {sample.target} & set(sample.history)
        assert len({names[item] for item in each.items}) == size
    assert draw_candidates(samples, names, size, str(seed)) == drawn
    assert draw_candidates(samples[-1:], names, size, str(seed)) == drawn[-1:]  # whatever others there are


def test_every_place_is_as_likely() -> None:
    names = [str(item) for item in range(30)]
    drawn = draw_candidates([Sample(user, (0,), 7) for user in range(4000)], names, 5, "0")
    places = Counter(each.place for each in drawn)
    assert set(places) == set(range(5)) and min(places.values()) > 700  # 800 expected, 25 its standard deviation
    others = Counter(item for each in drawn for item in each.items if item != 7)
    assert set(others) == set(range(30)) - {0, 7} and 450 < min(others.values()) <= max(others.values()) < 700
    assert draw_candidates([Sample(0, (0,), 7)], names, 5, "1") != drawn[:1]


def test_too_few_items() -> None:
    with pytest.raises(DataError, match="got 4 where user 3 has 3 of different names, the target among them"):
        draw_candidates([Sample(3, (0, 1), 2)], list("abcde"), 4, "0")
    with pytest.raises(DataError, match="got 3 where user 0 has 2 of different names"):
        draw_candidates([Sample(0, (0,), 1)], ["a", "b", "b", "c", "c"], 3, "0")
    with pytest.raises(ConfigurationError, match="num_candidates must be at least 2, got 1"):
        draw_candidates([], [], 1, "0")


def test_the_best_are_retrieved(
    make_retriever: Callable[..., Retriever], split: LeaveOneOut, table: np.ndarray
) -> None:
    retriever, samples = make_retriever(4), split.samples("test")
    scores = retriever.scores(samples)
    orders = [np.argsort(-table[sample.history[-1]]) for sample in samples]
    np.testing.assert_array_equal(scores.numpy(), [table[sample.history[-1]] for sample in samples])
    whole = retriever.take(samples, scores)
    assert [set(each.items) for each in whole] == [set(order[:4].tolist()) for order in orders]
    assert any(list(each.items) != order[:4].tolist() for each, order in zip(whole, orders, strict=True))
    unseen = retriever.take(samples, scores, filter_seen=True)
    for sample, each, order in zip(samples, unseen, orders, strict=True):
        assert set(each.items) == set([item for item in order if item not in sample.history][:4])
    assert make_retriever(4, "t").take(samples, scores) != whole
    found = retriever.retrieved(samples)
    assert found == [each for each in whole if each.target in each.items] and 0 < len(found) < len(whole)
    assert retriever.retrieved(samples, 2) == found[:2]


def test_small_catalogs_and_ties(make_retriever: Callable[..., Retriever]) -> None:
    sample = Sample(0, (1, 2), 0)
    retriever = make_retriever(2, values=np.array([[0, 5, 5, 5]] * 4, dtype=np.float32))
    (each,) = retriever.take([sample], retriever.scores([sample]))
    assert set(each.items) == {1, 2} and each.place is None
    (each,) = retriever.take([sample], retriever.scores([sample]), filter_seen=True)
    assert set(each.items) == {3, 0} and each.place is not None
    everything = Sample(0, (0, 1, 2, 3), 0)
    assert retriever.take([everything], retriever.scores([everything]), filter_seen=True)[0].items == ()
    (each,) = make_retriever(9).take([sample], make_retriever(9).scores([sample]))
    assert len(each.items) == 9 == len(set(each.items))
    with pytest.raises(ConfigurationError, match="num_candidates must be at least 2, got 1"):
        make_retriever(1)


def test_the_place() -> None:
    assert CandidateSet(0, (1,), (4, 2, 3), 2).place == 1
    assert CandidateSet(0, (1,), (4, 2, 3), 7).place is None
