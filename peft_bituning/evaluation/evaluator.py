"""Full ranking of I items for U users, seen items kept and left out at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..data.samples import HistoryAndTarget, Sample
from ..errors import ConfigurationError, InputError
from ..metrics import ranking_metrics, standard_errors, target_ranks
from ..recommenders import pad_histories
from .catalog_ranks import MAX_SCORES, catalog_ranks
from .encoded_users import EncodedUsers

USERS_A_PASS = 1024
#: What becomes of the items of a user's own history in each mode; in print, "seen items kept" or "seen items left out".
SEEN_ITEMS = {"unfiltered": "kept", "filtered": "left out"}


class HistoryRecommender(Protocol):
    """Anything that scores the catalog for a batch of histories."""

    @property
    def num_items(self) -> int:
        """Catalog size I."""

    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """`[B, N]` indices and mask -> `[B, I]`."""


SampleT = TypeVar("SampleT", bound=HistoryAndTarget)


@dataclass(frozen=True, eq=False)
class RankingReport:
    """Ranks `[U]` float64 of the targets among all items, and among those that are not in the user's history.

    A target that is in it counts as last place. `k` is the length of the list that counts for recall and NDCG.

    Raises:
        InputError: The two do not have the same shape `[U]`.
    """

    ranks_unfiltered: np.ndarray
    ranks_filtered: np.ndarray
    k: int = 10

    def __post_init__(self) -> None:
        if self.ranks_unfiltered.ndim != 1 or self.ranks_unfiltered.shape != self.ranks_filtered.shape:
            raise InputError(
                "ranks_unfiltered and ranks_filtered must both have shape [users], "
                f"got {list(self.ranks_unfiltered.shape)} and {list(self.ranks_filtered.shape)}"
            )

    def metrics(self, groups: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Return `{"unfiltered": {"recall@10": .., "recall@10_se": .., ..}, "filtered": {..}, "users": U}`.

        With groups of users, masks `[U]` bool by name, the same of each that is not empty comes under `"groups"`.
        """
        unfiltered, filtered = (
            {**ranking_metrics(ranks, self.k), **standard_errors(ranks, self.k)}
            for ranks in (self.ranks_unfiltered, self.ranks_filtered)
        )
        found = {"unfiltered": unfiltered, "filtered": filtered, "users": len(self.ranks_unfiltered)}
        if groups is not None:
            found["groups"] = {name: self.of(users).metrics() for name, users in groups.items() if users.any()}
        return found

    def of(self, users: np.ndarray) -> "RankingReport":
        """Return the report of some users, a mask `[U]`."""
        return RankingReport(self.ranks_unfiltered[users], self.ranks_filtered[users], self.k)


def rank_batches(
    rank: Callable[[list[SampleT]], tuple[np.ndarray, np.ndarray]],
    samples: Sequence[SampleT],
    *,
    batch_size: int,
    k: int = 10,
) -> RankingReport:
    """Rank every sample's target, a batch at a time, as `evaluate_ranking` does.

    `rank` gives the ranks of up to `batch_size` samples, `[B]` with seen items kept and `[B]` with them left out.
    """
    for name, value in (("batch_size", batch_size), ("k", k)):
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value!r}")
    if not len(samples):
        raise InputError("there is no sample to evaluate; users need at least three events to have one")
    starts = range(0, len(samples), batch_size)
    ranks = [rank(list(samples[start : start + batch_size])) for start in starts]
    unfiltered, filtered = (np.concatenate(mode) for mode in zip(*ranks, strict=True))
    return RankingReport(unfiltered, filtered, k)


def evaluate_ranking(
    score: Callable[[list[SampleT]], Tensor | np.ndarray],
    samples: Sequence[SampleT],
    *,
    batch_size: int = 256,
    k: int = 10,
) -> RankingReport:
    """Rank every sample's target among the whole catalog, ties mid-rank; one `[B, I]` batch of scores is held.

    Args:
        score: Scores of all catalog items for up to `batch_size` samples, `[B, I]`. One that says its `num_items`, as
            `history_scorer`'s does, gets fewer samples where the batch's scores would be more than `MAX_SCORES`.
        samples: Samples with `history` and `target`; the items of `history` are the seen ones.
        batch_size: Samples scored at once, at most.
        k: Length of the list that counts for recall and NDCG.

    Raises:
        ConfigurationError: `batch_size` or `k` is below 1.
        InputError: There is no sample, or scores have a wrong shape or NaN.
    """

    def rank(batch: list[SampleT]) -> tuple[np.ndarray, np.ndarray]:
        scores = score(batch)
        targets = [sample.target for sample in batch]
        seen = [set(sample.history) for sample in batch]
        return target_ranks(scores, targets), target_ranks(scores, targets, seen)

    at_most = max(1, MAX_SCORES // (getattr(score, "num_items", None) or 1))
    return rank_batches(rank, samples, batch_size=min(batch_size, at_most), k=k)


def rank_users(
    encoder: HistoryEncoder,
    samples: Sequence[Sample],
    table: ItemTable,
    progress: bool = False,
    description: str = "evaluating",
    swap_collaborative: bool = False,
    encoded: EncodedUsers | None = None,
) -> RankingReport:
    """Rank the whole catalog for users; every process must call it, and all get the same report.

    Args:
        encoder: Holds the weights to rank with.
        samples: One row per user.
        table: The item table.
        progress: Show a progress bar.
        description: Its label.
        swap_collaborative: Give every user the collaborative embeddings of another, to see what they matter.
        encoded: Keeps the users' embeddings.
    """
    table = table.to(encoder.device)
    generator = torch.Generator().manual_seed(0)

    def rank(batch: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        histories = [sample.history for sample in batch]
        others = None
        if swap_collaborative:
            # Rolled along a random cycle: nobody keeps their own.
            cycle = torch.randperm(len(batch), generator=generator).tolist()
            other_of = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
            others = [histories[other_of[row]] for row in range(len(batch))]
        users = encoder.encode(histories, "user", True, progress, description, others)
        if encoded is not None:
            encoded.keep(histories, users)
        return catalog_ranks(users.to(encoder.device), table, [sample.target for sample in batch], histories)

    return rank_batches(rank, samples, batch_size=USERS_A_PASS)


@dataclass(frozen=True)
class HistoryScorer:
    """Scores samples by their histories, for `evaluate_ranking`.

    Args:
        recommender: An ID recommender, `Popularity` or `ItemKNN`: what scores the catalog for histories.
        device: Where the histories are put; `None` is the CPU.
    """

    recommender: HistoryRecommender
    device: torch.device | str | None = None

    @property
    def num_items(self) -> int:
        """Catalog size I."""
        return self.recommender.num_items

    def __call__(self, samples: Sequence[HistoryAndTarget]) -> Tensor:
        """Return the scores `[B, I]` of B samples."""
        item_indices, mask = pad_histories([sample.history for sample in samples])
        return self.recommender.scores(item_indices.to(self.device), mask.to(self.device))


def history_scorer(recommender: HistoryRecommender, device: torch.device | str | None = None) -> HistoryScorer:
    """Return a `HistoryScorer`, the `score` argument of `evaluate_ranking`, from a recommender over histories."""
    return HistoryScorer(recommender, device)
