"""Retrieved items ranked again: the arithmetic of ranks, the loss, and what is trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bench.candidates import CandidatePrompts, LetterModel, Reranker, Retriever, letter_tokens
from bench.candidates.reranker import reranked_scores
from bench.candidates.sets import CandidateSet
from bench.pooling import PooledModel
from torch import Tensor, nn

from peft_bituning.base_models import BaseModel
from peft_bituning.data import LeaveOneOut
from peft_bituning.data.samples import Sample
from peft_bituning.errors import ConfigurationError, DataError
from peft_bituning.evaluation import evaluate_ranking

Make = Callable[..., Reranker]


class Planted(nn.Module):
    """Knows the prompts of some sets, and gives the letter of each one's target the best score."""

    def __init__(self, prompts: CandidatePrompts, sets: Sequence[CandidateSet], best: float = 5.0) -> None:
        super().__init__()
        self.known = {tuple(prompts.prompt(each.history, each.items)): each.place for each in sets}
        self.best = best
        self.rows = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        letters = torch.arange(4.0).repeat(len(input_ids), 1) / 10
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            place = self.known[tuple(ids[mask.bool()].tolist())]
            self.rows += 1
            if place is not None:
                letters[row, place] = self.best
        return letters


@pytest.fixture
def make_reranker(
    make_prompts: Callable[..., CandidatePrompts],
    make_retriever: Callable[..., Retriever],
    make_base: Callable[[], BaseModel],
    make_arguments: Callable[..., Any],
    split: LeaveOneOut,
) -> Make:
    """Return a maker of rerankers; `model` in place of the tiny language model."""

    def make(model: Any = None, retriever: Any = None, trained_on: str = "retrieved", **changes: Any) -> Reranker:
        prompts = make_prompts()
        model = model or LetterModel(PooledModel(make_base().model), letter_tokens(prompts, 4))
        retriever = retriever or make_retriever(4)
        common = (prompts, split, make_arguments(**changes), 0, torch.device("cpu"))
        return Reranker(model, *common, retriever=retriever, trained_on=trained_on)

    return make


def test_the_candidates_come_first() -> None:
    scores = np.array([5, 9, 9, 1, 7, 8, 0], dtype=np.float32)
    found = reranked_scores(scores, (4, 1, 5), np.array([-1e4, 0.25, 3.0], dtype=np.float32))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(np.argsort(-found, kind="stable"), [5, 1, 4, 2, 0, 3, 6])
    np.testing.assert_array_equal(found[[0, 2, 3, 6]], [5, 9, 1, 0])
    assert found[5] - found[1] == 2.75  # equal letters would stay equal
    np.testing.assert_array_equal(reranked_scores(scores, (), np.empty(0)), scores)


def test_a_planted_perfect_scorer(
    make_reranker: Make, make_retriever: Callable[..., Retriever], split: LeaveOneOut
) -> None:
    """Retrieved targets come first, the others keep the retriever's rank; in both filter modes."""
    retriever, samples = make_retriever(4), split.samples("test")
    samples += [Sample(20 + item, (item,), (item + 1) % 10) for item in range(10)]
    known = retriever.scores(samples)
    modes = [retriever.take(samples, known), retriever.take(samples, known, filter_seen=True)]
    prompts = make_reranker().prompts
    planted = Planted(prompts, [*modes[0], *modes[1]])
    reranker = make_reranker(planted)
    report = reranker.rank(samples)
    own = evaluate_ranking(retriever.scores, samples)
    pairs = [(modes[0], report.ranks_unfiltered, own.ranks_unfiltered)]
    pairs.append((modes[1], report.ranks_filtered, own.ranks_filtered))
    for sets, found, before in pairs:
        retrieved = np.array([each.place is not None for each in sets])
        assert retrieved.any() and not retrieved.all()
        np.testing.assert_array_equal(found[retrieved], 1)
        np.testing.assert_array_equal(found[~retrieved], before[~retrieved])
        assert (before[retrieved] <= 4).all() and (before[retrieved] > 1).any()
    assert planted.rows == len({*modes[0], *modes[1]}) < 2 * len(samples)  # the same both ways is asked once
    scores = reranker.scores(samples)
    np.testing.assert_array_equal(
        [1 + (row > row[sample.target]).sum() for row, sample in zip(scores, samples, strict=True)],
        report.ranks_unfiltered,
    )


def test_a_scorer_that_is_wrong_puts_the_target_last_of_the_candidates(
    make_reranker: Make, make_retriever: Callable[..., Retriever], split: LeaveOneOut
) -> None:
    retriever, samples = make_retriever(4), split.samples("test")
    sets = retriever.take(samples, retriever.scores(samples))
    unseen = retriever.take(samples, retriever.scores(samples), filter_seen=True)
    report = make_reranker(Planted(make_reranker().prompts, [*sets, *unseen], best=-5.0)).rank(samples)
    ranks = [rank for each, rank in zip(sets, report.ranks_unfiltered, strict=True) if each.place is not None]
    assert ranks and set(ranks) == {4.0}


def test_the_order_of_the_letters_is_that_of_the_model(make_reranker: Make, split: LeaveOneOut) -> None:
    """Scores of a batch are those of each prompt alone, by the whole language model."""
    reranker, samples = make_reranker(), split.samples("valid")
    sets = reranker.retriever.take(samples, reranker.retriever.scores(samples))
    sets[0] = CandidateSet(sets[0].user, sets[0].history, sets[0].items[:2], sets[0].target)
    found = reranker.letter_scores(sets)
    assert [len(each) for each in found] == [2] + [4] * 12
    base, tokens = reranker.model.pooled.language_model, reranker.model.tokens
    for each, letters in zip(sets, found, strict=True):
        ids = torch.tensor([reranker.prompts.prompt(each.history, each.items)])
        with torch.no_grad():
            expected = base(ids).logits[0, -1, tokens[: len(each.items)]]
        np.testing.assert_allclose(letters, expected.numpy(), atol=1e-5)


def test_the_loss(make_reranker: Make) -> None:
    """Cross-entropy over the letters that a row has."""
    reranker = make_reranker()
    rows = [CandidateSet(0, (1, 2), (3, 4, 5, 6), 5), CandidateSet(1, (0,), (7, 8), 7)]
    letters = [scores.astype(np.float64) for scores in reranker.letter_scores(rows)]
    expected = sum(np.log(np.exp(scores).sum()) - scores[place] for scores, place in zip(letters, (2, 0), strict=True))
    assert reranker.loss(reranker.model, rows).item() == pytest.approx(expected, rel=1e-5)
    assert [reranker.weight(row) for row in rows] == [1, 1]
    assert reranker.length(rows[1]) == len(reranker.prompts.prompt((0,), (7, 8)))


def test_what_is_trained_on(make_reranker: Make, split: LeaveOneOut, table: np.ndarray) -> None:
    reranker = make_reranker(max_samples_per_epoch=None)
    samples = split.training_samples("every_cut", 0, 1)
    fitting = [each for each in samples if each.target in np.argsort(-table[each.history[-1]])[:4]]
    rows = reranker.rows(1)
    assert [(row.user, row.history, row.target) for row in rows] == [
        (each.user, each.history, each.target) for each in fitting
    ]
    assert 0 < len(rows) < len(samples)
    for row in rows:
        assert row.place is not None and set(row.items) == set(np.argsort(-table[row.history[-1]])[:4].tolist())
    assert len({row.place for row in rows}) == 4  # the letter says nothing of the rank
    few = make_reranker(max_samples_per_epoch=3)
    assert few.rows(1) == rows[:3] and few.rows(0) != few.rows(1)
    random = make_reranker(trained_on="random", max_samples_per_epoch=None).rows(1)
    assert [row.target for row in random] == [each.target for each in samples]
    assert all(not set(row.items) - {row.target} & set(row.history) for row in random)


def test_refusals(make_reranker: Make, make_retriever: Callable[..., Retriever], split: LeaveOneOut) -> None:
    never = np.zeros((10, 10), dtype=np.float32)
    for item in range(10):
        never[item, [(item + 5) % 10, (item + 6) % 10]] = 1  # the ring's next item is another
    with pytest.raises(DataError, match="must be among the 2 items retrieved for it, got none of 26"):
        make_reranker(retriever=make_retriever(2, values=never)).rows(0)
    with pytest.raises(ConfigurationError, match="trained_on must be one of retrieved, random, got 'all'"):
        make_reranker(trained_on="all")
    everything = Sample(0, tuple(range(10)), 3)
    report = make_reranker().rank([everything])  # nothing is left to retrieve where seen items are left out
    assert report.ranks_filtered.tolist() == [10.0]
