"""Encoded users: what was kept is what is given back, scaled to length 1."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.catalog import ItemTable
from peft_bituning.data import ItemCatalog, LeaveOneOut
from peft_bituning.errors import InputError
from peft_bituning.evaluation import EncodedUsers, evaluate_ranking, history_scorer, rank_users
from peft_bituning.recommenders import Hybrid
from peft_bituning.recommenders.hybrid import Sources
from peft_bituning.recommenders.hybrid.part import PARTS


def table(num_items: int = 5, width: int = 3) -> ItemTable:
    return ItemTable(torch.randn(num_items, width, generator=torch.Generator().manual_seed(0)))


@given(
    st.lists(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4), max_size=4),
    st.lists(st.integers(0, 99), max_size=6),
)
def test_the_latest_of_each_history_is_given_back(batches: list[list[list[int]]], wanted: list[int]) -> None:
    encoded = EncodedUsers(table())
    kept: dict[tuple[int, ...], list[float]] = {}
    for number, histories in enumerate(batches):
        vectors = torch.randn(len(histories), 3, generator=torch.Generator().manual_seed(number)) * 5
        encoded.keep(histories, vectors)
        for history, vector in zip(histories, vectors, strict=True):
            kept[tuple(history)] = (vector / vector.norm()).tolist()
    asked = [list(kept)[place % len(kept)] for place in wanted] if kept else []
    found = encoded.user_embeddings(asked)
    assert found.shape == (len(asked), 3) and found.dtype == torch.float32
    for row, history in zip(found.tolist(), asked, strict=True):
        assert row == pytest.approx(kept[history], abs=1e-6)
    with pytest.raises(InputError, match=r"histories must be among those that were encoded, got \(4, 4, 4, 4\)"):
        encoded.user_embeddings([*asked, [4, 4, 4, 4]])


def test_the_table_is_the_items_side() -> None:
    rows = table()
    assert EncodedUsers(rows).item_embeddings is rows.embeddings


def test_lists_tuples_and_other_types_are_one_history() -> None:
    encoded = EncodedUsers(table())
    encoded.keep([(1, 2), []], torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16))
    found = encoded.user_embeddings([[1, 2], np.array([1, 2]), ()])
    assert found[:2].tolist() == [pytest.approx([0.6, 0.0, 0.8])] * 2
    assert found[2].tolist() == [0.0, 0.0, 0.0]  # nothing to scale


def test_as_many_vectors_as_histories() -> None:
    with pytest.raises(ValueError, match="zip"):
        EncodedUsers(table()).keep([[1], [2]], torch.ones(3, 3))


def test_ranking_by_what_was_kept_is_ranking_by_the_adapter(trained) -> None:
    samples = LeaveOneOut(trained.data.histories).samples("test")
    encoder, rows = trained.recommender.encoder, trained.recommender.table
    encoded = EncodedUsers(rows)
    report = rank_users(encoder, samples, rows, encoded=encoded)
    histories = [sample.history for sample in samples]
    cosines = encoded.user_embeddings(histories) @ rows.embeddings.T
    torch.testing.assert_close(cosines, rows.scores(encoder.encode(histories)), atol=1e-5, rtol=0)
    catalog: ItemCatalog = trained.data.items
    sources = Sources(catalog, torch.ones(len(catalog)), laser=encoded)
    again = evaluate_ranking(history_scorer(Hybrid([PARTS["laser"].fit(sources)], {"laser": 0.05}, sources)), samples)
    assert again.ranks_unfiltered == pytest.approx(report.ranks_unfiltered)
    assert again.ranks_filtered == pytest.approx(report.ranks_filtered)


def test_swapped_users_are_not_kept(trained) -> None:
    samples = LeaveOneOut(trained.data.histories).samples("test")[:4]
    encoder, rows = trained.recommender.encoder, trained.recommender.table
    encoded = EncodedUsers(rows)
    rank_users(encoder, samples, rows, encoded=encoded)
    before = encoded.user_embeddings([sample.history for sample in samples])
    rank_users(encoder, samples, rows, swap_collaborative=True)
    assert torch.equal(encoded.user_embeddings([sample.history for sample in samples]), before)
