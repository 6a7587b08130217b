"""Retrieved candidates, ranked again by a language model that names the next one's letter (as in LlamaRec).

Shapes: `B` rows, `K` candidates of a row, `I` catalog items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_bituning.data.samples import Sample
from peft_bituning.errors import ConfigurationError, DataError
from peft_bituning.evaluation import RankingReport, rank_batches
from peft_bituning.evaluation.catalog_ranks import MAX_SCORES
from peft_bituning.metrics import target_ranks

from .batches import pad_rows
from .letters import LetterModel
from .sets import SCORED_AT_ONCE, CandidateSet, Retriever, draw_candidates
from .task import CandidateTask

TRAINED_ON = ("retrieved", "random")


def reranked_scores(scores: np.ndarray, candidates: Sequence[int], letter_scores: np.ndarray) -> np.ndarray:
    """Put a row's candidates before all other items, in the order of their letters' scores.

    Args:
        scores: the retriever's [I].
        candidates: catalog indices of the K candidates.
        letter_scores: [K], finite.

    Returns:
        [I] float64: the retriever's scores, the candidates' above them all.
    """
    result = scores.astype(np.float64)
    if len(candidates):
        letters = letter_scores.astype(np.float64)
        result[list(candidates)] = letters - letters.min() + result.max() + 1.0
    return result


@dataclass(eq=False)
class Reranker(CandidateTask):
    """The two steps, and the training of the second: cross-entropy over the letters of a row's candidates.

    It is trained on `retrieved` candidates, rows whose target is retrieved with the items retrieved beside it, or on
    `random` ones, any rows with random unseen items beside the target; `ConfigurationError` on anything else.
    """

    model: LetterModel
    retriever: Retriever = field(kw_only=True)
    trained_on: str = field(default="retrieved", kw_only=True)

    def __post_init__(self) -> None:
        if self.trained_on not in TRAINED_ON:
            raise ConfigurationError(f"trained_on must be one of {', '.join(TRAINED_ON)}, got {self.trained_on!r}")
        self.validation = self.arguments.validation_samples(self.split)

    # ------------------------------------------------------------------ training

    def _epoch_rows(self, epoch: int) -> list[CandidateSet]:
        """Take the first `max_samples_per_epoch` of the epoch's shuffled cuts that fit."""
        arguments, limit = self.arguments, self.arguments.max_samples_per_epoch
        samples = self.split.training_samples(arguments.cuts, arguments.seed, epoch)  # type: ignore[arg-type]
        seed = f"{arguments.seed}/{epoch}"
        if self.trained_on == "random":
            return draw_candidates(samples[:limit], self.prompts.names, self.retriever.size, seed)
        retriever = Retriever(self.retriever.scorer, self.retriever.size, seed)
        rows = retriever.retrieved(samples, limit)
        if not rows:
            raise DataError(
                f"some training row's target must be among the {self.retriever.size} items retrieved for it, got none "
                f"of {len(samples)}; take more candidates, train the recommender longer, or trained_on: random"
            )
        return rows

    def length(self, row: CandidateSet) -> int:
        """Return the tokens of a row's prompt."""
        return len(self.prompts.prompt(row.history, row.items))

    def weight(self, row: CandidateSet) -> int:
        """Return 1: every row counts the same."""
        return 1

    def loss(self, model: nn.Module, rows: Sequence[CandidateSet]) -> Tensor:
        """Sum `-log softmax(letters of the row's candidates)[the target's letter]` over rows that hold their
        targets.
        """
        targets = torch.tensor([row.items.index(row.target) for row in rows], device=self.device)
        return F.cross_entropy(self._letters(model, rows), targets, reduction="sum")

    def validate(self, description: str) -> tuple[float, dict[str, Any]]:
        """Rank the validation users; epochs are chosen by unfiltered NDCG@10."""
        metrics = self.rank(self.validation, description).metrics()
        return metrics["unfiltered"]["ndcg@10"], metrics

    # ------------------------------------------------------------------ ranking

    @torch.no_grad()
    def letter_scores(self, sets: Sequence[CandidateSet], description: str = "") -> list[np.ndarray]:
        """Score the candidates of each set, which has one at least -> `[K]` float32 per set, in the order of its
        items.
        """

        def run(numbers: list[int]) -> list[np.ndarray]:
            chosen = [sets[number] for number in numbers]
            letters = self._letters(self.model, chosen).cpu().numpy()
            return [row[: len(each.items)] for row, each in zip(letters, chosen, strict=True)]

        return self._run(run, [self.length(each) for each in sets], description)

    def rank(self, samples: Sequence[Sample], description: str = "") -> RankingReport:
        """Rank the whole catalog: the candidates first, then all others as they were retrieved.

        Where seen items are left out, they are left out before the candidates are taken, so that as many unseen ones
        are ranked again. Users whose candidates are the same both ways are run once.

        Args:
            samples: histories with their targets.
            description: label of the progress bar; none without it.

        Returns:
            The ranks in both filter modes.
        """

        def rank(batch: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
            known = self.retriever.scores(batch)
            unfiltered = self.retriever.take(batch, known)
            filtered = self.retriever.take(batch, known, filter_seen=True)
            asked = list(dict.fromkeys(each for each in [*unfiltered, *filtered] if each.items))
            letters = dict(zip(asked, self.letter_scores(asked, description), strict=True))
            targets, seen = [sample.target for sample in batch], [set(sample.history) for sample in batch]
            return (
                target_ranks(_all_reranked(known, unfiltered, letters), targets),
                target_ranks(_all_reranked(known, filtered, letters), targets, seen),
            )

        at_once = min(SCORED_AT_ONCE, max(1, MAX_SCORES // len(self.prompts.items)))
        with torch.no_grad():
            return rank_batches(rank, samples, batch_size=at_once)

    @torch.no_grad()
    def scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """Score the whole catalog for samples, seen items kept -> [B, I]; as one user is served."""
        known = self.retriever.scores(samples)
        sets = self.retriever.take(samples, known)
        return _all_reranked(known, sets, dict(zip(sets, self.letter_scores(sets), strict=True)))

    def _letters(self, model: nn.Module, rows: Sequence[CandidateSet]) -> Tensor:
        """Score the letters of rows [B, K], -inf where a row has fewer candidates."""
        ids = [self.prompts.prompt(row.history, row.items) for row in rows]
        letters = model(**pad_rows(ids, self.pad_token_id, self.device))  # [B, K]
        counts = torch.tensor([len(row.items) for row in rows], device=letters.device)
        places = torch.arange(letters.shape[1], device=letters.device)
        return letters.masked_fill(places >= counts[:, None], -torch.inf)


def _all_reranked(
    scores: Tensor, sets: Sequence[CandidateSet], letters: Mapping[CandidateSet, np.ndarray]
) -> np.ndarray:
    """Rerank every row [B, I]; one whose set is empty stays as it is."""
    rows = zip(scores.numpy(), sets, strict=True)
    return np.stack([reranked_scores(row, each.items, letters.get(each, np.empty(0))) for row, each in rows])
