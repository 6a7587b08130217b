"""The hybrid's index against the whole score matrix, sorted."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from peft_bituning.catalog import ExactIndex, FaissIndex
from peft_bituning.catalog.hybrid_index import HybridIndex
from peft_bituning.data import ItemCatalog
from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.recommenders import Hybrid, TextVectors, build_recommender, pad_histories
from peft_bituning.recommenders.hybrid import Sources
from peft_bituning.recommenders.hybrid.hybrid import counts_of
from peft_bituning.recommenders.hybrid.part import PARTS

NUM_ITEMS = 24
UNTOUCHED = 3  # the last items, which nobody has bought
DENSE = ("popularity", "sequence", "laser")
SPARSE = ("seen", "last", "item_knn")
TEXTS = ("text", "text_last", "text_seen", "text_last_seen")
CHUNKED = partial(ExactIndex, chunk_size=2, item_chunk_size=5)
WORDS = ("lamp", "kettle", "pan", "rope", "drill", "glove")


@dataclass
class Embedder:
    """An adapter that embeds users as the mean of what they bought, and says how often it was asked."""

    item_embeddings: Tensor
    asked: list[int] = field(default_factory=list)

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        self.asked.append(len(histories))
        start = torch.linspace(1, -1, self.item_embeddings.shape[1])
        return normalize(
            torch.stack([start + sum((self.item_embeddings[item] for item in h), start) for h in histories]), dim=1
        )


@cache
def sources(text: str) -> Sources:
    random = np.random.default_rng(0)
    records = [
        {"item_id": f"i{n}", "title": f"{WORDS[n % 6]} {WORDS[n % 5]}", "brand": f"brand {n % 4}"}
        for n in range(NUM_ITEMS)
    ]
    sequences = [random.integers(0, NUM_ITEMS - UNTOUCHED, 6).tolist() for _ in range(20)]
    generator = torch.Generator().manual_seed(0)
    return Sources(
        ItemCatalog.from_records(records),
        counts_of(sequences, NUM_ITEMS),
        sequences,
        None if text == "none" else build_recommender("sasrec", NUM_ITEMS, hidden_size=8, initializer_range=0.3).eval(),
        Embedder(normalize(torch.randn(NUM_ITEMS, 5, generator=generator), dim=1)),
        {"tf-idf": "tf-idf", "vectors": TextVectors("made up", random.normal(size=(NUM_ITEMS, 4)))}.get(text),
    )


@cache
def all_parts(text: str) -> tuple[Any, ...]:
    made = [part.fit(sources(text)) for part in PARTS.values()]
    return tuple(part for part in made if part is not None)


def hybrid_of(weights: Mapping[str, float], text: str = "tf-idf") -> Hybrid:
    return Hybrid(all_parts(text), weights, sources(text))


def histories_of(hybrid: Hybrid, rows: Sequence[Sequence[int]]) -> Any:
    return hybrid.histories(*pad_histories(rows))


def check(
    index: HybridIndex,
    rows: Sequence[Sequence[int]],
    k: int,
    exclude: Sequence[Collection[int]] | None = None,
    candidates: Sequence[int] | None = None,
) -> None:
    """Hold what is found against the whole matrix; items whose scores differ by less than rounding may change places.

    Rounding is relative to the longest query and item, whose product may be far above that of any of their sums.
    """
    hybrid = index.hybrid
    plain = hybrid.scores(*pad_histories(rows)).double().numpy()
    histories = histories_of(hybrid, rows)
    scores, items = index.search(histories, k, exclude, candidates)
    assert scores.shape == items.shape == (len(rows), k)
    assert scores.dtype == torch.float32 and items.dtype == torch.int64
    lengths = hybrid.queries(histories).norm(dim=1).double().numpy() * index.length
    for row in range(len(rows)):
        allowed = set(range(hybrid.num_items) if candidates is None else candidates)
        allowed -= set(() if exclude is None else exclude[row])
        number = min(k, len(allowed))
        found, values = items[row, :number].tolist(), scores[row, :number].double().numpy()
        assert items[row, number:].tolist() == [-1] * (k - number)
        assert scores[row, number:].tolist() == [-np.inf] * (k - number)
        assert len(set(found)) == number and set(found) <= allowed
        tolerance = 2e-6 * max(1.0, lengths[row], np.abs(plain[row]).max())
        assert values == pytest.approx(plain[row, found], abs=tolerance)
        best = np.sort(plain[row, sorted(allowed)])[::-1][:number]
        assert values == pytest.approx(best, abs=tolerance)
        assert sorted(zip(-values, found, strict=True)) == list(zip(-values, found, strict=True))


def exactly(plain: Sequence[float], allowed: Collection[int] | None = None) -> list[int]:
    """Return the items by their scores, ties by their places."""
    return sorted(range(len(plain)) if allowed is None else set(allowed), key=lambda item: (-plain[item], item))


weight = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.3, 7.0, -12.5])
item = st.integers(0, NUM_ITEMS - 1)
histories = st.lists(st.one_of(st.just([]), st.lists(item, max_size=9)), min_size=1, max_size=5)
asked = st.fixed_dictionaries(
    {
        "rows": histories,
        "k": st.integers(1, NUM_ITEMS + 3),
        "candidates": st.one_of(st.none(), st.just([]), st.lists(item, max_size=30)),
        "left_out": st.one_of(st.none(), st.just("seen"), st.lists(st.lists(item, max_size=30), min_size=5)),
    }
)


def exclude_of(question: Mapping[str, Any]) -> list[Collection[int]] | None:
    if question["left_out"] in (None, "seen"):
        return None if question["left_out"] is None else [set(row) for row in question["rows"]]
    return question["left_out"][: len(question["rows"])]


# ---------------------------------------------------------------------- all parts, any weights


@pytest.mark.parametrize("text", ["tf-idf", "vectors"])
@settings(max_examples=120, deadline=None)
@given(weights=st.fixed_dictionaries({name: weight for name in (*DENSE, *SPARSE, *TEXTS)}), question=asked)
def test_the_list_is_the_sorted_matrix(text: str, weights: dict[str, float], question: dict[str, Any]) -> None:
    hybrid = hybrid_of(weights, text)
    for make_index in (ExactIndex, CHUNKED):
        index = HybridIndex(hybrid, make_index)
        check(index, question["rows"], question["k"], exclude_of(question), question["candidates"])


@settings(max_examples=60, deadline=None)
@given(weights=st.fixed_dictionaries({name: weight for name in SPARSE}), question=asked)
def test_sparse_parts_alone_leave_zero_vectors(weights: dict[str, float], question: dict[str, Any]) -> None:
    hybrid = hybrid_of(weights)
    assert not hybrid.item_vectors.any()
    for make_index in (ExactIndex, CHUNKED):
        index = HybridIndex(hybrid, make_index)
        check(index, question["rows"], question["k"], exclude_of(question), question["candidates"])


@settings(max_examples=60, deadline=None)
@given(weights=st.fixed_dictionaries({name: weight for name in DENSE}), question=asked)
def test_dense_parts_alone(weights: dict[str, float], question: dict[str, Any]) -> None:
    hybrid = hybrid_of(weights)
    assert not any(part.sparse for part in hybrid.parts)
    for make_index in (ExactIndex, CHUNKED):
        index = HybridIndex(hybrid, make_index)
        check(index, question["rows"], question["k"], exclude_of(question), question["candidates"])


@pytest.mark.parametrize("text", ["tf-idf", "vectors"])
@settings(max_examples=40, deadline=None)
@given(weights=st.fixed_dictionaries({name: weight for name in (*DENSE, *SPARSE, *TEXTS)}), question=asked)
def test_through_a_graph_that_finds_everything(text: str, weights: dict[str, float], question: dict[str, Any]) -> None:
    pytest.importorskip("faiss")
    index = HybridIndex(hybrid_of(weights, text), partial(FaissIndex, efSearch=4 * NUM_ITEMS))
    check(index, question["rows"], question["k"], exclude_of(question), question["candidates"])


@pytest.mark.parametrize("text", ["tf-idf", "vectors"])
def test_one_part_after_the_other(text: str) -> None:
    rows = [[3, 3, 7], [], [NUM_ITEMS - 1], list(range(NUM_ITEMS)), [5] * 40]
    names = [name for part in all_parts(text) for name in part.features]
    assert set(names) == {*DENSE, *SPARSE, *TEXTS}
    for name in names:
        for sign in (2.0, -2.0):
            check(HybridIndex(hybrid_of({name: sign}, text)), rows, NUM_ITEMS)


def test_without_text_and_without_an_id_recommender() -> None:
    hybrid = hybrid_of({"popularity": 1.5, "seen": -2.0, "laser": 0.2, "item_knn": 3.0}, "none")
    assert {part.name for part in hybrid.fitted_parts} == {"popularity", "seen", "last", "laser", "item_knn"}
    check(HybridIndex(hybrid), [[1, 2], [], [1, 2, 1]], 10)


def test_lists_do_not_depend_on_who_else_is_asked() -> None:
    hybrid = hybrid_of({"popularity": 1.0, "laser": 0.5, "text": 4.0, "item_knn": 2.0, "sequence": 1.0})
    rows, index = [[3, 3, 7], [], [NUM_ITEMS - 1], [8, 1, 4, 2]], HybridIndex(hybrid)
    scores, items = index.search(histories_of(hybrid, rows), 7)
    for place, row in enumerate(rows):
        alone_scores, alone = index.search(histories_of(hybrid, [row]), 7)
        assert torch.equal(alone[0], items[place])
        torch.testing.assert_close(alone_scores[0], scores[place], atol=1e-5, rtol=1e-5)


def test_users_that_are_at_hand_are_not_embedded_again() -> None:
    hybrid = hybrid_of({"laser": 1.0, "seen": -1.0})
    rows, index, embedder = [[3, 7], [], [4]], HybridIndex(hybrid), sources("tf-idf").laser
    assert isinstance(embedder, Embedder)
    histories = histories_of(hybrid, rows)
    histories.embeddings = embedder.user_embeddings(rows)
    embedder.asked.clear()
    scores, items = index.search(histories, 5)
    assert embedder.asked == []
    expected = index.search(histories_of(hybrid, rows), 5)
    assert embedder.asked == [3]
    assert torch.equal(items, expected[1]) and torch.equal(scores, expected[0])


# ---------------------------------------------------------------------- ties


@pytest.mark.parametrize("make_index", [ExactIndex, CHUNKED])
@pytest.mark.parametrize("by", [1.0, -1.0])
def test_ties_of_a_dense_part_go_to_the_lower_index(make_index: Any, by: float) -> None:
    hybrid = hybrid_of({"popularity": by})
    plain = (by * sources("tf-idf").without_mean(sources("tf-idf").counts.log1p()[:, None])[:, 0]).tolist()
    assert len(set(plain)) < NUM_ITEMS - UNTOUCHED  # there are ties beside those of items that nobody bought
    index = HybridIndex(hybrid, make_index)
    for k in range(1, NUM_ITEMS + 1):
        _, items = index.search(histories_of(hybrid, [[1], []]), k)
        assert items.tolist() == [exactly(plain)[:k]] * 2


@pytest.mark.parametrize("make_index", [ExactIndex, CHUNKED])
@pytest.mark.parametrize("by", [1.0, -1.0])
def test_ties_of_a_sparse_part_go_to_the_lower_index(make_index: Any, by: float) -> None:
    hybrid = hybrid_of({"seen": by})
    rows = [[7, 2], [], list(range(NUM_ITEMS))]
    plain = [[by * (item in row) for item in range(NUM_ITEMS)] for row in rows]
    index = HybridIndex(hybrid, make_index)
    for k in (1, 2, 3, 8, NUM_ITEMS):
        scores, items = index.search(histories_of(hybrid, rows), k)
        assert items.tolist() == [exactly(row)[:k] for row in plain]
        assert scores.tolist() == [[row[item] for item in exactly(row)[:k]] for row in plain]


@pytest.mark.parametrize("make_index", [ExactIndex, CHUNKED])
def test_a_cell_that_comes_to_nothing_ties_with_untouched_items(make_index: Any) -> None:
    hybrid = hybrid_of({"text": 1.0, "text_last": -1.0})  # the same of a history of one item
    histories = histories_of(hybrid, [[9]])
    cells = hybrid.cells(histories)
    assert len(cells.items) > 3 and not cells.values.any()
    index = HybridIndex(hybrid, make_index)
    for k in (1, 5, NUM_ITEMS):
        assert index.search(histories, k)[1].tolist() == [list(range(k))]
        assert index.search(histories, k, exclude=[[0, 3]])[1][0, 0] == 1


@pytest.mark.parametrize("make_index", [ExactIndex, CHUNKED])
def test_equal_vectors_tie(make_index: Any) -> None:
    class Axes(Embedder):
        def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([[0.6, 0.8, 0.0]]).expand(len(histories), -1)

    given = Sources(sources("none").items, torch.ones(NUM_ITEMS), laser=Axes(torch.eye(3)[torch.arange(NUM_ITEMS) % 3]))
    hybrid = Hybrid([PARTS["laser"].fit(given), PARTS["last"].fit(given)], {"laser": 0.25, "last": -100.0}, given)
    plain = [(0.6, 0.8, 0.0)[item % 3] - 100 * (item == 4) for item in range(NUM_ITEMS)]
    index = HybridIndex(hybrid, make_index)
    for k in (1, 7, 8, 9, NUM_ITEMS):
        assert index.search(histories_of(hybrid, [[1, 4]]), k)[1].tolist() == [exactly(plain)[:k]]


def test_where_nothing_was_bought_only_the_order_is_left() -> None:
    given = Sources(sources("none").items, torch.zeros(NUM_ITEMS))
    hybrid = Hybrid([PARTS["popularity"].fit(given)], {"popularity": 5.0}, given)
    assert len(hybrid.parts) == 1 and not hybrid.item_vectors.any()
    scores, items = HybridIndex(hybrid).search(histories_of(hybrid, [[1], []]), 4, candidates=[9, 4, 23, 4, 2])
    assert items.tolist() == [[2, 4, 9, 23]] * 2 and not scores.any()


def test_without_any_weight_all_items_tie() -> None:
    hybrid = hybrid_of({})
    assert hybrid.parts == []
    scores, items = HybridIndex(hybrid).search(histories_of(hybrid, [[1], []]), NUM_ITEMS + 1)
    assert items.tolist() == [[*range(NUM_ITEMS), -1]] * 2
    assert scores.tolist() == [[0.0] * NUM_ITEMS + [-np.inf]] * 2


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ConfigurationError, "k must be at least 1, got 0"),
        ({"candidates": [NUM_ITEMS]}, InputError, "candidates must be catalog indices from 0 to 23, got .24"),
        ({"exclude": [[-1], []]}, InputError, "exclude must be catalog indices from 0 to 23, got .-1"),
        ({"exclude": [[]]}, InputError, "exclude must have one entry for each of the 2 queries, got 1"),
    ],
)
def test_wrong_questions_are_refused_as_by_other_indexes(arguments: dict[str, Any], error: Any, message: str) -> None:
    hybrid = hybrid_of({"popularity": 1.0, "seen": 1.0})
    with pytest.raises(error, match=message):
        HybridIndex(hybrid).search(histories_of(hybrid, [[1], []]), **{"k": 3, **arguments})
