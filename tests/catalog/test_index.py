"""Exact search against a sort written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from peft_bituning.catalog.index import ExactIndex
from peft_bituning.errors import ConfigurationError, InputError


def brute_force(embeddings, query, k, exclude=(), candidates=None):
    """Sort by descending cosine, then by index."""
    scores = functional.normalize(query[None], dim=1) @ functional.normalize(embeddings, dim=1).T
    allowed = [i for i in (range(len(embeddings)) if candidates is None else candidates) if i not in exclude]
    best = sorted(set(allowed), key=lambda i: (-scores[0, i].item(), i))[:k]
    return best + [-1] * (k - len(best))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_search_equals_a_sort(data):
    num_items = data.draw(st.integers(1, 9))
    # axis-aligned embeddings give exact ties
    rows = data.draw(st.lists(st.integers(0, 2), min_size=num_items, max_size=num_items))
    embeddings = torch.eye(3)[rows]
    count = data.draw(st.integers(1, 5))
    queries = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=count, max_size=count))
    ).float()
    index_set = st.sets(st.integers(0, num_items - 1))
    exclude = [data.draw(index_set) for _ in range(count)]
    candidates = data.draw(st.none() | index_set.map(sorted))
    k = data.draw(st.integers(1, 10))
    item_chunk_size = data.draw(st.integers(1, 10))
    scores, indices = ExactIndex(embeddings, 2, item_chunk_size).search(queries, k, exclude, candidates)
    for row in range(count):
        assert indices[row].tolist() == brute_force(embeddings, queries[row], k, exclude[row], candidates)
        found = indices[row][indices[row] >= 0]
        cosines = functional.normalize(queries[row : row + 1], dim=1) @ embeddings[found].T
        assert torch.allclose(scores[row, : len(found)], cosines[0])
        assert (scores[row, len(found) :] == float("-inf")).all()


def test_scores_are_cosines_whatever_the_lengths():
    embeddings = torch.randn(6, 4)
    scale = torch.tensor([1e-3, 1.0, 10.0, 5.0, 0.1, 1e3])[:, None]
    plain = ExactIndex(embeddings).search(embeddings, 6)
    scaled = ExactIndex(embeddings * scale).search(embeddings * 7, 6)
    assert torch.equal(plain[1], scaled[1])
    assert torch.allclose(plain[0], scaled[0], atol=1e-6)
    assert plain[1][:, 0].tolist() == list(range(6))


def test_chunks_of_items_change_nothing():
    generator = torch.Generator().manual_seed(0)
    embeddings, queries = torch.randn(500, 8, generator=generator), torch.randn(7, 8, generator=generator)
    exclude = [list(range(row * 20, row * 20 + 30)) for row in range(7)]
    whole = ExactIndex(embeddings).search(queries, 20, exclude)
    parts = ExactIndex(embeddings, item_chunk_size=33).search(queries, 20, exclude)
    assert torch.equal(parts[1], whole[1])
    assert torch.allclose(parts[0], whole[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_alone_finds_what_it_finds_among_others(dtype: torch.dtype) -> None:
    """One query goes through numpy: the same sums in another order, so D rounding steps apart at most."""
    generator = torch.Generator().manual_seed(0)
    table = functional.normalize(torch.randn(1000, 576, generator=generator), dim=1).to(dtype)
    queries = torch.randn(9, 576, generator=generator)
    exclude = [list(range(row, 1000, 7)) for row in range(9)]
    index = ExactIndex(table, item_chunk_size=300)
    together = index.search(queries, 20, exclude)
    exact = functional.normalize(queries.double(), dim=1) @ functional.normalize(table.double(), dim=1).T
    for row in range(9):
        scores, indices = index.search(queries[row : row + 1], 20, [exclude[row]])
        assert torch.equal(indices[0], together[1][row])
        bound = 576 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(scores[0].double(), exact[row, indices[0]], atol=bound, rtol=0)


def test_no_more_scores_than_a_chunk_are_held(monkeypatch):
    widths = []
    score = ExactIndex._score

    def counted(self, *args):
        block, found = score(self, *args)
        widths.append(tuple(block.shape))
        return block, found

    monkeypatch.setattr(ExactIndex, "_score", counted)
    ExactIndex(torch.randn(50, 4), chunk_size=3, item_chunk_size=20).search(torch.randn(5, 4), 2)
    assert widths == [(3, 20), (3, 20), (3, 10), (2, 20), (2, 20), (2, 10)]


def test_candidates_keep_the_scores_bit_for_bit():
    embeddings, queries = torch.randn(50, 16), torch.randn(4, 16)
    index = ExactIndex(embeddings)
    scores, indices = index.search(queries, 50)
    few_scores, few_indices = index.search(queries, 5, candidates=[3, 8, 40, 41, 42])
    for row in range(4):
        full = dict(zip(indices[row].tolist(), scores[row].tolist(), strict=True))
        assert [full[i] for i in few_indices[row].tolist()] == few_scores[row].tolist()


def test_fewer_left_than_asked_for_are_padded():
    scores, indices = ExactIndex(torch.eye(3)).search(torch.eye(3)[:1], 5, exclude=[[0]])
    assert indices.tolist() == [[1, 2, -1, -1, -1]]
    assert scores[0, 2:].tolist() == [float("-inf")] * 3


def test_no_candidates_and_no_queries():
    index = ExactIndex(torch.eye(3))
    assert index.search(torch.eye(3)[:2], 2, candidates=[])[1].tolist() == [[-1, -1], [-1, -1]]
    assert index.search(torch.zeros(0, 3), 2)[1].shape == (0, 2)
    assert len(index) == 3


def test_finite_rows_are_taken_whatever_their_length():
    index = ExactIndex(torch.tensor([[1.0, 0.0], [3e38, 3e38], [0.0, 0.0]]))  # the second's length is infinite
    assert index.search(torch.tensor([[2.0, 1e-3]]), 3)[1].tolist() == [[0, 1, 2]]


def test_bad_input_is_named():
    index = ExactIndex(torch.eye(3))
    with pytest.raises(InputError, match=r"embeddings must have shape \[items, width\], got \[3\]"):
        ExactIndex(torch.zeros(3))
    with pytest.raises(InputError, match=r"embeddings must be finite, got NaN or infinity in rows \[1\]"):
        ExactIndex(torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(ConfigurationError, match="chunk_size must be at least 1"):
        ExactIndex(torch.eye(3), chunk_size=0)
    with pytest.raises(ConfigurationError, match="k must be at least 1, got 0"):
        index.search(torch.eye(3), 0)
    with pytest.raises(InputError, match=r"queries must have shape \[rows, 3\], got \[3, 2\]"):
        index.search(torch.zeros(3, 2), 1)
    with pytest.raises(InputError, match="exclude must have one entry for each of the 3 queries, got 1"):
        index.search(torch.eye(3), 1, exclude=[[0]])
    with pytest.raises(InputError, match="exclude must be catalog indices from 0 to 2"):
        index.search(torch.eye(3)[:1], 1, exclude=[[3]])
    with pytest.raises(InputError, match="candidates must be catalog indices from 0 to 2"):
        index.search(torch.eye(3), 1, candidates=[-1])
    with pytest.raises(InputError, match=r"queries must be finite, got NaN or infinity in rows \[0\]"):
        index.search(torch.full((1, 3), torch.inf), 1)


def test_an_item_table_is_not_copied() -> None:
    table = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    queries = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert ExactIndex(table).embeddings.data_ptr() == table.data_ptr()
    scaled = ExactIndex(table * 3)
    assert scaled.embeddings.data_ptr() != table.data_ptr()
    halves = table.bfloat16()
    mapped = ExactIndex(halves, item_chunk_size=64)
    assert mapped.embeddings.data_ptr() == halves.data_ptr()
    expected = ExactIndex(halves.float() * 2).search(queries, 7)
    found = mapped.search(queries, 7)
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(scaled.search(queries, 7)[0], ExactIndex(table).search(queries, 7)[0], atol=1e-6, rtol=0)
