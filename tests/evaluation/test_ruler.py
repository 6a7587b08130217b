"""Is the ruler straight: what must come out where nothing can be known, where everything is, and by another tool."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # before ranx: compiling takes longer than 60 rows

import numpy as np
import pytest

from peft_bituning.data import LeaveOneOut
from peft_bituning.evaluation import evaluate_ranking, history_scorer
from peft_bituning.recommenders import Popularity

ITEMS, USERS = 80, 3000


@dataclass(frozen=True)
class Row:
    """A history and what came next."""

    history: tuple[int, ...]
    target: int


@pytest.fixture(scope="module")
def histories() -> list[tuple[int, ...]]:
    """Return users who walk in steps of one from a start that few items are; what comes next is certain."""
    generator = np.random.default_rng(0)
    starts = generator.choice(ITEMS, USERS, p=_weights())
    return [tuple((int(start) + step) % ITEMS for step in range(5)) for start in starts]


def _weights() -> np.ndarray:
    weights = 1.0 / np.arange(1, ITEMS + 1)
    return weights / weights.sum()


def next_item(samples: Sequence[Row]) -> np.ndarray:
    """Score by the only rule that there is: the item after the last."""
    scores = np.zeros((len(samples), ITEMS))
    for row, sample in enumerate(samples):
        scores[row, (sample.history[-1] + 1) % ITEMS] = 1
    return scores


def test_a_scorer_that_sees_the_target_gives_one(histories: list[tuple[int, ...]]) -> None:
    samples = LeaveOneOut(histories).samples("test")

    def oracle(batch: Sequence[Row]) -> np.ndarray:
        return np.eye(ITEMS)[[sample.target for sample in batch]]

    for mode in ("unfiltered", "filtered"):
        found = evaluate_ranking(oracle, samples).metrics()[mode]
        assert found["recall@10"] == found["ndcg@10"] == found["mrr"] == 1
        assert evaluate_ranking(next_item, samples).metrics()[mode]["ndcg@10"] == 1


def test_shuffled_targets_leave_popularity(histories: list[tuple[int, ...]]) -> None:
    """Nothing that reads histories can beat popularity's level once targets are dealt anew among the users."""
    samples = LeaveOneOut(histories).samples("test")
    targets = np.random.default_rng(1).permutation([sample.target for sample in samples])
    dealt = [Row(tuple(sample.history), int(target)) for sample, target in zip(samples, targets, strict=True)]
    shares = np.bincount(targets, minlength=ITEMS) / len(targets)
    popular = Popularity(ITEMS).fit([[target] for target in targets.tolist()])
    level = evaluate_ranking(history_scorer(popular), dealt).metrics()["unfiltered"]
    by_hand = np.sort(shares)[::-1][:10] @ (1 / np.log2(np.arange(2, 12)))
    assert level["ndcg@10"] == pytest.approx(by_hand, rel=0.02)  # ties count half
    learned = evaluate_ranking(next_item, dealt).metrics()["unfiltered"]
    assert learned["recall@10"] < level["recall@10"]
    # its first place is right as often as two draws from the targets agree, the rest is a tie of all others
    assert learned["ndcg@10"] == pytest.approx((shares**2).sum(), abs=3 * learned["ndcg@10_se"])


def test_random_scores_give_chance() -> None:
    generator = np.random.default_rng(2)
    samples = [Row((int(row) % ITEMS,), int(generator.integers(ITEMS))) for row in range(USERS)]
    found = evaluate_ranking(lambda batch: generator.random((len(batch), ITEMS)), samples).metrics()["unfiltered"]
    assert found["recall@10"] == pytest.approx(10 / ITEMS, abs=3 * found["recall@10_se"])
    assert found["mrr"] == pytest.approx((1 / np.arange(1, ITEMS + 1)).mean(), abs=3 * found["mrr_se"])


def test_ranx_says_the_same_where_nothing_ties(tmp_path: Path) -> None:
    ranx = pytest.importorskip("ranx")
    generator = np.random.default_rng(3)
    rows, items = 60, 40
    scores = generator.permuted(np.tile(np.arange(items, dtype=float), (rows, 1)), axis=1)
    samples = [Row(tuple(generator.choice(items, 4).tolist()), int(generator.integers(items))) for _ in range(rows)]
    place = {id(sample): row for row, sample in enumerate(samples)}
    report = evaluate_ranking(lambda batch: scores[[place[id(each)] for each in batch]], samples).metrics()
    qrels = {f"u{row}": {f"i{sample.target}": 1} for row, sample in enumerate(samples)}
    kept = [row for row, sample in enumerate(samples) if sample.target not in sample.history]
    for mode, users in (("unfiltered", list(range(rows))), ("filtered", kept)):
        run = {
            f"u{row}": {
                f"i{item}": float(scores[row, item])
                for item in range(items)
                if mode == "unfiltered" or item not in samples[row].history
            }
            for row in users
        }
        theirs = ranx.evaluate(
            ranx.Qrels({user: qrels[user] for user in run}), ranx.Run(run), ["recall@10", "ndcg@10", "mrr"]
        )
        ours = report[mode]
        if mode == "filtered":  # a target that was seen counts as last place, which ranx does not know
            ours = evaluate_ranking(
                lambda batch: scores[[place[id(each)] for each in batch]], [samples[row] for row in kept]
            ).metrics()[mode]
        assert {name: ours[name] for name in theirs} == pytest.approx({k: float(v) for k, v in theirs.items()})
