"""`HybridRecommender`: ranks the catalog by a hybrid, with no language model in memory where it has no part `laser`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..base_models import BaseModel
from ..catalog.hybrid_index import HybridIndex
from ..catalog.index import ExactIndex, ItemIndex
from ..catalog.text_encoder import TFIDF, open_text_encoder
from ..data import ItemCatalog
from ..data.collator import pad_histories
from ..errors import ConfigurationError
from ..recommenders import Hybrid
from ..recommenders.histories import Histories
from ..recommenders.hybrid import EmbeddingRecommender
from ..recommenders.hybrid.tfidf import texts_of
from . import hub
from .folder import read_catalog, read_hybrid
from .requests import history_indices, positive, short, strings

USERS_AT_ONCE = 256


class HybridRecommender:
    """Recommends items for purchase histories by a weighted sum of parts (docs/hybrid.md).

    Args:
        items: the catalog.
        hybrid: what scores; its sources are of the same catalog.
        results: what was measured when it was trained.
        base: the language model, where `add_items` needs it for texts.
    """

    def __init__(
        self,
        items: ItemCatalog,
        hybrid: Hybrid,
        results: Mapping[str, Any] | None = None,
        base: BaseModel | None = None,
    ) -> None:
        if hybrid.num_items != len(items):
            raise ConfigurationError(f"hybrid must be of {len(items)} items, got one of {hybrid.num_items}")
        self.items = items
        self.hybrid = hybrid
        self.results = dict(results or {})
        self.base = base
        self._make_index: Callable[[Tensor], ItemIndex] = ExactIndex
        self.index = HybridIndex(hybrid)

    def __repr__(self) -> str:
        """Name the catalog's size and the weights."""
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in self.hybrid.weights.items())
        return f"{type(self).__name__}({len(self.items)} items; {weights})"

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        filter_seen: bool = True,
        candidates: Sequence[str] | None = None,
        on_unknown: str = "error",
        show_progress_bar: bool = False,
        explain: bool = False,
    ) -> list[Any]:
        """Recommend the items of greatest score.

        Args:
            histories: item ids in time order, one sequence a user; an empty one is a cold start.
            k: items a user at most.
            filter_seen: leave the history's own items out.
            candidates: item ids to choose from; None is the whole catalog.
            on_unknown: `error` names item ids that are not in the catalog, `ignore` reads the history without them.
            show_progress_bar: show one.
            explain: say what each part gives to a score.

        Returns:
            For each user, `(item_id, score)` from best to worst, or `(item_id, score, {part: share})` whose shares add
            up to the score; fewer than k where fewer are left.

        Raises:
            UnknownItemError: an id is not in the catalog.
            ConfigurationError: k below 1, or an unknown `on_unknown`.
        """
        indices = history_indices(self.items, histories, on_unknown)
        return self.ranked(indices, k, filter_seen, candidates, show_progress_bar, explain)

    def ranked(
        self,
        indices: Sequence[Sequence[int]],
        k: int = 10,
        filter_seen: bool = True,
        candidates: Sequence[str] | None = None,
        show_progress_bar: bool = False,
        explain: bool = False,
        embeddings: Tensor | None = None,
    ) -> list[Any]:
        """Do what `recommend` does for histories of catalog indices, with users' embeddings `[B, D]` if at hand."""
        k = positive("k", k)
        allowed = None if candidates is None else self.items.indices_of(strings(candidates, "candidates"))
        found: list[Any] = []
        for start in tqdm(range(0, len(indices), USERS_AT_ONCE), "recommending", disable=not show_progress_bar):
            batch = indices[start : start + USERS_AT_ONCE]
            users = None if embeddings is None else embeddings[start : start + USERS_AT_ONCE]
            histories = Histories(*pad_histories(batch), len(self.items), users)
            exclude = [sorted(set(history)) for history in batch] if filter_seen else None
            _, places = self.index.search(histories, k, exclude, allowed)
            found += self._lists(histories, places, explain)
        return found

    def _lists(self, histories: Histories, places: Tensor, explain: bool) -> list[Any]:
        """Score what was found once more, in float64 and part by part, so that every score is the sum of its shares."""
        shares = self.hybrid.shares(histories, places)
        scores = sum(shares.values(), torch.zeros(places.shape, dtype=torch.float64))
        rows: list[Any] = []
        for row, items in enumerate(places.tolist()):
            order = sorted(range(sum(item >= 0 for item in items)), key=lambda place: -float(scores[row, place]))
            made: list[Any] = []
            for place in order:
                entry: tuple[Any, ...] = (self.items.item_ids[items[place]], float(scores[row, place]))
                made.append(
                    (*entry, {name: float(share[row, place]) for name, share in shares.items()}) if explain else entry
                )
            rows.append(made)
        return rows

    def use_index(self, make_index: Callable[[Tensor], ItemIndex]) -> None:
        """Search the dense parts through another index than `ExactIndex`; see `LaserRecommender.use_index`."""
        self.index = HybridIndex(self.hybrid, make_index)
        self._make_index = make_index

    def add_items(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Add items that nobody has bought: their text is compared, what counts is neutral to them.

        Args:
            items: records with `item_id`, `title` and other attributes.

        Raises:
            DataError: an id is already in the catalog, or a record has none; nothing was added.
            ConfigurationError: not a list of records, or the texts' model cannot be opened.
        """
        if isinstance(items, Mapping | str):
            raise ConfigurationError(f"items must be a list of records, got {short(items)}; for one item write [...]")
        self.take(self.grown(self.items.extended(items)))

    def grown(self, items: ItemCatalog, laser: EmbeddingRecommender | None = None) -> "HybridRecommender":
        """Return a recommender of a catalog with new items at its end, and of an adapter that has embedded them."""
        model, texts = self.hybrid.text_model, texts_of(items, len(self.items))
        vectors: np.ndarray | None = None
        if texts and model not in (None, TFIDF, "vectors"):  # nobody knows what made an array's vectors
            vectors = open_text_encoder(str(model), self.base).encode(texts, False)
        other = HybridRecommender(items, self.hybrid.extended(items, vectors, laser), self.results, self.base)
        other.use_index(self._make_index)
        return other

    def take(self, other: "HybridRecommender") -> None:
        """Become another recommender, all at once."""
        self.__dict__ = {**self.__dict__, **other.__dict__}

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, revision: str | None = None, token: str | None = None
    ) -> "HybridRecommender":
        """Load a saved recommender without its adapter and language model, by the weights fitted without them.

        Args:
            path_or_repo: a folder, or a Hub repository.
            revision: commit, branch or tag of the repository.
            token: Hub token.

        Raises:
            ArtifactError: a file is missing or changed, or the folder was saved without a hybrid.
        """
        folder = Path(path_or_repo)
        if not folder.is_dir():
            folder = hub.download(str(path_or_repo), revision=revision, token=token)
        items, results, known = read_catalog(folder)
        return cls(items, read_hybrid(folder, items, known), results)
