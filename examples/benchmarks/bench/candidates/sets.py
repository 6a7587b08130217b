"""Candidates for a history's next item: drawn at random, or retrieved by a recommender."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_bituning.data.samples import Sample
from peft_bituning.errors import ConfigurationError, DataError
from peft_bituning.evaluation import HistoryScorer

SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class CandidateSet:
    """A history, the items one of which may be next, and the one that was."""

    user: int  # index of the user
    history: tuple[int, ...]  # catalog indices in time order
    items: tuple[int, ...]  # the candidates, each once, in the order in which they are shown
    target: int  # catalog index of the next item

    @property
    def place(self) -> int | None:
        """Where among the candidates the target is, from 0; None where it is not."""
        return self.items.index(self.target) if self.target in self.items else None


def draw_candidates(samples: Sequence[Sample], names: Sequence[str], size: int, seed: str) -> list[CandidateSet]:
    """Put random unseen items beside each target.

    Unseen is what the history does not hold: what the user takes later may be drawn, as nobody knows of it yet. No
    two candidates have the same name, so that a name tells which one is meant; a target that is bought again is a
    candidate though it was seen.

    Args:
        samples: histories with their targets.
        names: for every item of the catalog, what it is told apart by [I].
        size: candidates a set, the target among them.
        seed: decides the draw; the same history has the same candidates whatever other samples there are.

    Returns:
        One set a sample, the candidates in random order.

    Raises:
        ConfigurationError: `size` is below 2.
        DataError: the catalog has too few items of different names that a user has not seen.
    """
    if size < 2:
        raise ConfigurationError(f"num_candidates must be at least 2, got {size!r}")
    drawn: list[CandidateSet] = []
    for sample in samples:
        generator = _generator(seed, sample)
        tried = {*sample.history, sample.target}
        items, taken = [sample.target], {names[sample.target]}
        while len(items) < size:
            if len(tried) == len(names):
                raise DataError(
                    f"num_candidates must leave every user enough items that were not seen, got {size} where user "
                    f"{sample.user} has {len(items)} of different names, the target among them; take fewer"
                )
            item = generator.randrange(len(names))
            if item in tried:
                continue
            tried.add(item)
            if names[item] not in taken:
                items.append(item)
                taken.add(names[item])
        generator.shuffle(items)
        drawn.append(CandidateSet(sample.user, sample.history, tuple(items), sample.target))
    return drawn


@dataclass(frozen=True)
class Retriever:
    """Takes the best items of a frozen recommender; `ConfigurationError` where `size` is below 2."""

    scorer: HistoryScorer  # scores the catalog for histories
    size: int  # items to take; all of them where there are fewer
    seed: str  # decides in which order they are shown, so that their place says nothing of their rank

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ConfigurationError(f"num_candidates must be at least 2, got {self.size!r}")

    def scores(self, samples: Sequence[Sample]) -> Tensor:
        """Return the recommender's own scores [B, I] on the CPU."""
        return self.scorer(samples).float().cpu()

    def take(self, samples: Sequence[Sample], scores: Tensor, filter_seen: bool = False) -> list[CandidateSet]:
        """Take the best items of each row.

        Args:
            samples: B histories with their targets.
            scores: [B, I]; of equal ones the item that comes first in the catalog is taken.
            filter_seen: leave the items of the history out before.

        Returns:
            One set a sample; the target is among its items only where it was retrieved, and there may be fewer items
            than `size`, or none, where seen ones are left out.
        """
        order = scores.sort(dim=1, descending=True, stable=True).indices  # [B, I]
        sets: list[CandidateSet] = []
        for sample, row in zip(samples, order, strict=True):
            seen = set(sample.history) if filter_seen else set()
            best = row[: self.size + len(seen)].tolist()
            items = [item for item in best if item not in seen][: self.size]
            _generator(self.seed, sample).shuffle(items)
            sets.append(CandidateSet(sample.user, sample.history, tuple(items), sample.target))
        return sets

    def retrieved(self, samples: Sequence[Sample], limit: int | None = None) -> list[CandidateSet]:
        """Return the sets of the first samples, `limit` at most, whose target is among the items that are taken for
        them.
        """
        found: list[CandidateSet] = []
        for start in range(0, len(samples), SCORED_AT_ONCE):
            if limit is not None and len(found) >= limit:
                break
            part = samples[start : start + SCORED_AT_ONCE]
            with torch.no_grad():
                sets = self.take(part, self.scores(part))
            found.extend(each for each in sets if each.place is not None)
        return found[:limit]


def _generator(seed: str, sample: Sample) -> random.Random:
    return random.Random(f"candidates/{seed}/{sample.user}/{len(sample.history)}")
