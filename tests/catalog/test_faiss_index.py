"""faiss's candidates, scored and sorted as the exact index does."""

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from peft_bituning.catalog import ExactIndex, FaissIndex, measured_recall
from peft_bituning.errors import ConfigurationError, InputError

try:
    import faiss
except ImportError:
    faiss = None

needs_faiss = pytest.mark.skipif(faiss is None, reason="needs faiss-cpu")
KINDS = ["hnsw", "ivf_flat", "ivf_pq"]
# nothing is left to chance: as many candidates as there are items
EXHAUSTIVE = {
    "hnsw": {"efSearch": 1200},
    "ivf_flat": {"nlist": 12, "nprobe": 12},
    "ivf_pq": {"nlist": 12, "nprobe": 12, "refine": 40},
}


def clusters(num_items: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Rows around centres, fifty each, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_items // 50, width, generator=generator).repeat_interleave(50, 0)
    lengths = torch.rand(num_items, 1, generator=generator) + 0.1
    return (centres + 0.5 * torch.randn(num_items, width, generator=generator)) * lengths


def cosines(queries: torch.Tensor, embeddings: torch.Tensor) -> np.ndarray:
    left, right = queries.double().numpy(), embeddings.double().numpy()
    return (left @ right.T) / np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_candidates_it_is_the_exact_index(kind: str) -> None:
    embeddings, queries = clusters(1200), clusters(100, seed=1)[::10]
    random = np.random.default_rng(0)
    exclude = [random.integers(0, 1200, random.integers(0, 200)).tolist() for _ in range(10)]
    index, exact = FaissIndex(embeddings, kind, **EXHAUSTIVE[kind]), ExactIndex(embeddings)
    for excluded in (None, exclude):
        scores, indices = index.search(queries, 10, excluded)
        true_scores, true_indices = exact.search(queries, 10, excluded)
        assert torch.equal(indices, true_indices)
        assert scores.dtype == torch.float32 and torch.allclose(scores, true_scores, atol=1e-6)


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_defaults_find_most_and_scores_are_exact(kind: str) -> None:
    embeddings, queries = clusters(3000), clusters(100, seed=0)
    index = FaissIndex(embeddings, kind)
    assert measured_recall(index, ExactIndex(embeddings), queries) > 0.95
    scores, indices = index.search(queries, 10)
    assert scores.numpy() == pytest.approx(
        np.take_along_axis(cosines(queries, embeddings), indices.numpy(), 1), abs=1e-6
    )
    assert (scores.diff(dim=1) <= 0).all()


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_excluded_items_are_replaced_by_the_next(kind: str) -> None:
    embeddings, queries = clusters(1200), clusters(100, seed=1)[::10]
    index = FaissIndex(embeddings, kind)
    nearest = ExactIndex(embeddings).search(queries, 60)[1].tolist()
    exclude = [row[: 6 * place] for place, row in enumerate(nearest)]  # none of the first, 54 of the last
    scores, indices = index.search(queries, 10, exclude)
    assert scores.isfinite().all()
    for found, left_out in zip(indices.tolist(), exclude, strict=True):
        assert not set(found) & set(left_out) and len(set(found)) == 10
    true = ExactIndex(embeddings).search(queries, 10, exclude)[1].tolist()
    assert np.mean([len(set(row) & set(best)) / 10 for row, best in zip(indices.tolist(), true, strict=True)]) > 0.9


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_lower_index(kind: str) -> None:
    embeddings = clusters(400).repeat(3, 1)  # item i, i + 400 and i + 800 are one
    index = FaissIndex(embeddings, kind, **EXHAUSTIVE[kind])
    scores, indices = index.search(embeddings[:9], 3)
    assert indices.tolist() == [[row, row + 400, row + 800] for row in range(9)]
    assert (scores == scores[:, :1]).all()
    assert index.search(embeddings[:9], 2, exclude=[[row] for row in range(9)])[1].tolist() == [
        [row + 400, row + 800] for row in range(9)
    ]


@needs_faiss
def test_more_clusters_are_searched_where_too_few_items_are_left() -> None:
    embeddings = clusters(1200)
    index = FaissIndex(embeddings, "ivf_flat", nlist=24, nprobe=1)
    inside = index.faiss_index.search(functional.normalize(embeddings[:1]).numpy(), 1200)[1][0]
    inside = inside[inside >= 0]  # the whole nearest cluster
    scores, indices = index.search(embeddings[:2], 10, exclude=[inside.tolist(), []])
    assert scores.isfinite().all() and not set(indices[0].tolist()) & set(inside.tolist())
    scores, indices = index.search(embeddings[:1], 500)
    assert scores.isfinite().all() and len(set(indices[0].tolist())) == 500


@needs_faiss
def test_what_a_graph_cannot_reach_is_searched_exactly() -> None:
    """Hundreds of equal rows have links to each other alone."""
    embeddings = torch.cat([torch.eye(8)[:1].repeat(600, 1), clusters(600, width=8)])
    index = FaissIndex(embeddings, "hnsw", M=2, efSearch=1)
    scores, indices = index.search(-torch.eye(8)[:1], 400, exclude=[range(700, 800)])
    true_scores, true_indices = ExactIndex(embeddings).search(-torch.eye(8)[:1], 400, [range(700, 800)])
    assert (indices >= 0).all() and len(set(indices[0].tolist())) == 400
    assert not set(indices[0].tolist()) & set(range(700, 800))
    reached = index.faiss_index.search(-np.eye(8, dtype=np.float32)[:1], 500)[1][0]
    assert (reached < 0).any()  # so that the graph alone would not have done
    assert torch.equal(indices, true_indices) and torch.allclose(scores, true_scores, atol=1e-6)


@needs_faiss
def test_small_catalogs_and_candidates_are_searched_exactly() -> None:
    embeddings, queries = clusters(300), clusters(50, seed=1)[:6]
    index, exact = FaissIndex(embeddings), ExactIndex(embeddings)
    exclude = [list(range(row * 40, row * 40 + 90)) for row in range(6)]
    for k, excluded, candidates in (
        (200, None, None),
        (10, [*exclude[:5], range(300)], None),
        (10, exclude, None),
        (10, exclude, list(range(0, 300, 7))),
        (10, None, [5, 3, 3, 290]),
        (2, None, []),
    ):
        scores, indices = index.search(queries, k, excluded, candidates)
        true_scores, true_indices = exact.search(queries, k, excluded, candidates)
        assert torch.equal(indices, true_indices)
        assert torch.allclose(scores, true_scores, atol=1e-6)
    assert index.search(torch.zeros(0, 16), 3)[1].shape == (0, 3)
    assert len(index) == 300


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    embeddings = clusters(1000)
    first, again, other = (faiss.serialize_index(FaissIndex(embeddings, kind, seed).faiss_index) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@needs_faiss
def test_embeddings_stay_where_they_are(tmp_path) -> None:
    rows = clusters(600).bfloat16()
    rows.view(torch.uint8).numpy().tofile(tmp_path / "rows")
    mapped = torch.from_file(str(tmp_path / "rows"), size=rows.numel(), dtype=torch.bfloat16).view(600, 16)
    index = FaissIndex(mapped)
    assert index.embeddings.data_ptr() == mapped.data_ptr()
    scores, indices = index.search(rows[:5], 10)
    true_scores, true_indices = ExactIndex(rows).search(rows[:5], 10)
    assert torch.equal(indices, true_indices) and torch.allclose(scores, true_scores, atol=1e-6)


@needs_faiss
def test_recall_is_the_share_of_the_exact_list() -> None:
    embeddings, queries = clusters(1200), clusters(200, seed=1)
    index, exact = FaissIndex(embeddings, "ivf_flat", nlist=30, nprobe=1), ExactIndex(embeddings)
    best = np.argsort(-cosines(queries, embeddings), axis=1)[:, :20]
    found = index.search(queries, 20)[1].numpy()
    expected = np.mean([np.isin(row, true).mean() for row, true in zip(found, best, strict=True)])
    assert 0.1 < expected < 1
    assert measured_recall(index, exact, queries, 20) == pytest.approx(expected)
    assert measured_recall(exact, exact, queries, 5000) == 1.0
    with pytest.raises(ConfigurationError, match="queries must have at least one row"):
        measured_recall(index, exact, queries[:0])


@needs_faiss
def test_parameters_follow_the_catalog() -> None:
    assert FaissIndex(clusters(100)).parameters == {"M": 32, "efConstruction": 200, "efSearch": 128}
    assert FaissIndex(clusters(100), M=8).parameters["M"] == 8
    assert FaissIndex(clusters(100), "ivf_flat").parameters == {"nlist": 2, "nprobe": 2}
    assert FaissIndex(clusters(100), "ivf_flat", nlist=4, nprobe=64).parameters == {"nlist": 4, "nprobe": 4}
    index = FaissIndex(clusters(3000, width=24), "ivf_pq", nprobe=5)
    assert index.parameters == {"nlist": 76, "nprobe": 5, "code_size": 6, "refine": 20}
    assert index.faiss_index.nlist == 76 and index.faiss_index.pq.code_size == 6


@needs_faiss
def test_bad_input_is_named() -> None:
    embeddings = clusters(100)
    for parameters, message in (
        ({"kind": "tree"}, "kind must be one of hnsw, ivf_flat, ivf_pq, got 'tree'"),
        ({"nprobe": 3}, "parameters of hnsw must be among M, efConstruction, efSearch, got nprobe"),
        ({"M": 1}, "M must be from 2 to 65536, got 1"),
        ({"efSearch": 1.5}, "efSearch must be an integer, got 1.5"),
        ({"kind": "ivf_flat", "nlist": 101}, "nlist must be from 1 to 100, got 101"),
        ({"kind": "ivf_flat", "nprobe": 0}, "nprobe must be from 1 to 65536, got 0"),
        ({"kind": "ivf_pq", "code_size": 5}, "code_size must divide the width 16, got 5"),
        ({"kind": "ivf_pq"}, "ivf_pq must have at least 256 items to learn its codes from, got 100; take ExactIndex"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            FaissIndex(embeddings, **parameters)
    with pytest.raises(InputError, match=r"embeddings must have shape \[items, width\], got \[3\]"):
        FaissIndex(torch.zeros(3))
    with pytest.raises(InputError, match=r"embeddings must be finite, got NaN or infinity in rows \[20001\]"):
        FaissIndex(torch.eye(2).repeat(10_001, 1).index_fill_(0, torch.tensor(20_001), torch.nan), M=2)
    index = FaissIndex(embeddings)
    with pytest.raises(ConfigurationError, match="k must be at least 1, got 0"):
        index.search(embeddings, 0)
    with pytest.raises(InputError, match=r"queries must have shape \[rows, 16\], got \[3, 2\]"):
        index.search(torch.zeros(3, 2), 1)
    with pytest.raises(InputError, match="exclude must be catalog indices from 0 to 99"):
        index.search(embeddings[:1], 1, exclude=[[100]])
    with pytest.raises(InputError, match="candidates must be catalog indices from 0 to 99"):
        index.search(embeddings[:1], 1, candidates=[-1])


def test_a_missing_faiss_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigurationError, match="needs faiss .*; pip install faiss-cpu, or keep ExactIndex"):
        FaissIndex(torch.eye(3))
