"""The evaluator against one-batch ranking and hand-counted cases."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.evaluation import RankingReport, evaluate_ranking, evaluator, history_scorer
from peft_bituning.metrics import ranking_metrics, target_ranks
from peft_bituning.recommenders import Popularity


@dataclass(frozen=True)
class Row:
    history: tuple[int, ...]
    target: int


def make_rows(count, num_items=12):
    generator = np.random.default_rng(0)
    return [
        Row(tuple(generator.integers(0, num_items, 3).tolist()), int(generator.integers(0, num_items)))
        for _ in range(count)
    ]


def row_scores(rows):
    """Scores that depend on the row alone."""
    return np.stack([np.random.default_rng(sum(row.history) * 13 + row.target).normal(size=12) for row in rows])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_do_not_matter(batch_size):
    rows = make_rows(10)
    report = evaluate_ranking(row_scores, rows, batch_size=batch_size)
    scores, targets = row_scores(rows), [row.target for row in rows]
    assert report.ranks_unfiltered.tolist() == target_ranks(scores, targets).tolist()
    assert report.ranks_filtered.tolist() == target_ranks(scores, targets, [row.history for row in rows]).tolist()


def test_never_more_than_a_batch_is_scored():
    sizes = []

    def score(rows):
        sizes.append(len(rows))
        return torch.zeros(len(rows), 12)

    evaluate_ranking(score, make_rows(10), batch_size=4)
    assert sizes == [4, 4, 2]


def test_a_scorer_that_knows_its_catalog_gets_fewer_rows(monkeypatch):
    monkeypatch.setattr(evaluator, "MAX_SCORES", 12)
    popularity = Popularity(4).fit([[0, 1, 1], [1, 2]])
    sizes = []
    scores = popularity.scores

    def counted(item_indices, mask):
        sizes.append(len(mask))
        return scores(item_indices, mask)

    monkeypatch.setattr(popularity, "scores", counted)
    rows = make_rows(7, num_items=4)
    small = evaluate_ranking(history_scorer(popularity), rows)
    assert sizes == [3, 3, 1]
    monkeypatch.undo()
    assert small.metrics() == evaluate_ranking(history_scorer(popularity), rows).metrics()


def test_both_filter_modes_are_reported_with_standard_errors():
    rows = [Row((0, 1), 2), Row((2,), 0)]
    report = evaluate_ranking(lambda batch: [[3.0, 2.0, 1.0, 0.0]] * len(batch), rows, k=1).metrics()
    assert report["unfiltered"]["recall@1"] == 0.5  # ranks 3 and 1
    assert report["filtered"]["recall@1"] == 1.0  # ranks 1 and 1
    assert report["unfiltered"]["mrr"] == pytest.approx((1 / 3 + 1) / 2)
    assert report["unfiltered"]["mrr_se"] == pytest.approx(np.std([1 / 3, 1]) / np.sqrt(2))
    assert report["filtered"]["mrr_se"] == 0.0
    assert report["users"] == 2
    assert list(report["filtered"]) == ["recall@1", "ndcg@1", "mrr", "recall@1_se", "ndcg@1_se", "mrr_se"]


def test_a_repeated_target_is_last_when_seen_items_are_left_out():
    report = evaluate_ranking(lambda batch: [[1.0, 2.0, 3.0]], [Row((2, 0), 2)])
    assert report.ranks_unfiltered.tolist() == [1.0]
    assert report.ranks_filtered.tolist() == [3.0]


def test_report_can_be_built_from_gathered_ranks():
    report = RankingReport(np.array([1.0, 4.0]), np.array([1.0, 2.0]), k=3)
    assert report.metrics()["unfiltered"]["recall@3"] == ranking_metrics([1.0, 4.0], 3)["recall@3"]
    with pytest.raises(InputError, match="must both have shape"):
        RankingReport(np.array([1.0, 4.0]), np.array([1.0]))


def test_history_scorer_runs_a_recommender():
    popularity = Popularity(4).fit([[0, 1, 1], [1, 2]])
    report = evaluate_ranking(history_scorer(popularity), [Row((0,), 1), Row((), 3)])
    assert report.ranks_unfiltered.tolist() == [1.0, 4.0]


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no sample"):
        evaluate_ranking(row_scores, [])
    with pytest.raises(ConfigurationError, match="batch_size must be at least 1, got 0"):
        evaluate_ranking(row_scores, make_rows(2), batch_size=0)
    with pytest.raises(ConfigurationError, match="k must be at least 1, got 0"):
        evaluate_ranking(row_scores, make_rows(2), k=0)
    with pytest.raises(InputError, match="NaN"):
        evaluate_ranking(lambda rows: torch.full((len(rows), 12), torch.nan), make_rows(2))
