"""Ranks and metrics against hand-counted cases, brute force and ranx."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.errors import InputError
from peft_bituning.metrics import ranking_metrics, standard_errors, target_ranks


def brute_force_rank(scores, target, seen=None):
    """Count one by one, as the definition reads."""
    if seen is not None and target in seen:
        return float(len(scores))
    others = [s for i, s in enumerate(scores) if i != target and (seen is None or i not in seen)]
    return 1 + sum(s > scores[target] for s in others) + 0.5 * sum(s == scores[target] for s in others)


def test_hand_counted_ranks():
    scores = np.array([[3.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
    assert target_ranks(scores, [1, 0, 3]).tolist() == [2.5, 2.5, 1.0]
    # seen: leaving out item 0 lifts row 0; a seen target is last; a lower item left out changes nothing
    assert target_ranks(scores, [1, 0, 3], seen=[[0], [0, 1], {0, 1}]).tolist() == [1.5, 4.0, 1.0]


def test_repeated_seen_items_count_once():
    assert target_ranks([[3.0, 2.0, 1.0]], [2], seen=[[0, 0, 0]]).tolist() == [2.0]


def test_all_items_but_the_target_seen_gives_first_place():
    assert target_ranks([[3.0, 2.0, 1.0]], [2], seen=[[0, 1]]).tolist() == [1.0]


def test_infinite_scores_are_ordered():
    assert target_ranks([[-np.inf, 0.0, np.inf]], [1]).tolist() == [2.0]
    assert target_ranks([[-np.inf, -np.inf, 0.0]], [0]).tolist() == [2.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_and_numpy_agree(dtype):
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.tensor([0, 3, 8, 4, 4])
    expected = target_ranks(scores.double().numpy(), targets.numpy())
    result = target_ranks(scores, targets)
    assert result.dtype == np.float64
    assert result.tolist() == expected.tolist()


def test_scores_are_not_changed():
    scores = np.array([[3.0, 2.0, 1.0]])
    target_ranks(scores, [2], seen=[[0]])
    assert scores.tolist() == [[3.0, 2.0, 1.0]]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_ranks_equal_brute_force(data):
    num_items = data.draw(st.integers(1, 8))
    rows = data.draw(st.integers(1, 4))
    value = st.integers(-2, 2).map(float)  # few values, many ties
    scores = [data.draw(st.lists(value, min_size=num_items, max_size=num_items)) for _ in range(rows)]
    targets = [data.draw(st.integers(0, num_items - 1)) for _ in range(rows)]
    seen = [data.draw(st.lists(st.integers(0, num_items - 1), max_size=num_items)) for _ in range(rows)]
    assert target_ranks(scores, targets).tolist() == [
        brute_force_rank(*row) for row in zip(scores, targets, strict=True)
    ]
    filtered = target_ranks(scores, targets, seen)
    assert filtered.tolist() == [brute_force_rank(*row) for row in zip(scores, targets, seen, strict=True)]
    assert ((filtered >= 1) & (filtered <= num_items)).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=10))
def test_mid_ranks_of_all_items_sum_to_the_triangle_number(values):
    scores = np.tile(np.array(values, dtype=float), (len(values), 1))
    ranks = target_ranks(scores, np.arange(len(values)))
    assert ranks.sum() == len(values) * (len(values) + 1) / 2


def test_hand_counted_metrics():
    metrics = ranking_metrics([1.0, 2.5, 10.0, 10.5], k=10)
    assert metrics == {
        "recall@10": 0.75,
        "ndcg@10": pytest.approx((1 + 1 / math.log2(3.5) + 1 / math.log2(11)) / 4),
        "mrr": pytest.approx((1 + 1 / 2.5 + 1 / 10 + 1 / 10.5) / 4),
    }
    assert set(ranking_metrics([1.0], k=5)) == {"recall@5", "ndcg@5", "mrr"}


def test_standard_errors_are_deviation_over_root_of_users():
    errors = standard_errors([1.0, 1.0, 20.0, 30.0], k=10)
    assert errors["recall@10_se"] == pytest.approx(0.5 / 2)
    assert errors["mrr_se"] == pytest.approx(np.std([1, 1, 1 / 20, 1 / 30]) / 2)
    assert standard_errors([3.0])["mrr_se"] == 0.0


def test_metrics_equal_ranx():
    ranx = pytest.importorskip("ranx")
    generator = np.random.default_rng(0)
    scores = generator.permuted(np.tile(np.arange(40.0), (30, 1)), axis=1)  # no ties: ranx has its own order there
    targets = generator.integers(0, 40, size=30)
    qrels = ranx.Qrels({f"u{row}": {f"i{target}": 1} for row, target in enumerate(targets)})
    run = ranx.Run({f"u{r}": {f"i{i}": float(s) + 1 for i, s in enumerate(row)} for r, row in enumerate(scores)})
    expected = ranx.evaluate(qrels, run, ["recall@10", "ndcg@10", "mrr"])
    result = ranking_metrics(target_ranks(scores, targets))
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [0]), "scores must have shape"),
        (([[1.0, 2.0], [1.0]], [0, 0]), "equal lengths"),
        (([[1.0, 2.0]], [0, 1]), "targets must have shape"),
        (([[1.0, 2.0]], [0.0]), "targets must be integers"),
        (([[1.0, 2.0]], [2]), "targets must be catalog indices from 0 to 1"),
        (([[1.0, 2.0]], [-1]), "targets must be catalog indices from 0 to 1"),
        (([[1.0, 2.0], [math.nan, 1.0]], [0, 1]), r"NaN in 1 of 2 rows, first in rows \[1\]"),
        (([[1.0, 2.0]], [0], [[0], [1]]), "seen must have one entry for each"),
        (([[1.0, 2.0]], [0], [[5]]), "seen must be catalog indices"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        target_ranks(*arguments)


@pytest.mark.parametrize(
    ("ranks", "k", "message"),
    [
        ([], 10, "at least one user"),
        ([[1.0]], 10, "ranks must have shape"),
        ([0.5], 10, "numbers from 1"),
        ([math.nan], 10, "numbers from 1"),
        ([1.0], 0, "k must be at least 1"),
    ],
)
def test_bad_ranks_are_named(ranks, k, message):
    for function in (ranking_metrics, standard_errors):
        with pytest.raises(InputError, match=message):
            function(ranks, k)
