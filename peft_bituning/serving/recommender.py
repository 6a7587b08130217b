"""`LaserRecommender`: a trained adapter with everything it needs to recommend, in one folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from ..assembly import assemble
from ..base_models import BaseModel
from ..catalog.encoder import HistoryEncoder
from ..catalog.index import ExactIndex, ItemIndex
from ..catalog.item_table import ItemTable
from ..data import ItemCatalog, PromptTemplate
from ..errors import ConfigurationError
from ..recommenders import Hybrid, IDRecommender
from ..tuners.rows.embedding_model import EmbeddingModel
from .folder import ITEM_ADAPTER, USER_ADAPTER, LaserSettings
from .hybrid_recommender import HybridRecommender
from .requests import history_indices, positive, short, strings
from .saved_recommender import Embedded, SavedRecommender


class LaserRecommender(SavedRecommender):
    """Recommends items for purchase histories; load one with `from_pretrained`, train one with `training.fit`.

    Args:
        base: the frozen language model.
        model: the PEFT model with the adapters `default` (users, A') and `items` (the item table's, A).
        items: the catalog.
        table: the item table, in catalog order.
        template: the prompt template; the attributes that it prints are fixed here, so that added items with other
            columns cannot change the text of the present ones.
        id_recommender: the frozen ID recommender, or None where the prefix encoder needs none.
        settings: limits and provenance.
        device: where to run.
        hybrid: what ranks, or None for the adapter alone; its part `laser` reads this recommender.
    """

    def __init__(
        self,
        base: BaseModel,
        model: PeftModel,
        items: ItemCatalog,
        table: ItemTable,
        template: PromptTemplate,
        id_recommender: IDRecommender | None,
        settings: LaserSettings,
        device: torch.device | str | None = None,
        hybrid: Hybrid | None = None,
    ) -> None:
        if len(table) != len(items):
            raise ConfigurationError(f"the item table must have {len(items)} rows, one per item, got {len(table)}")
        self.base = base
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.template = replace(template, fields=template.fields_for(items))
        self.settings = settings
        self.items = items
        self.encoder = assemble(
            base,
            cast(EmbeddingModel, model.eval()),
            items,
            id_recommender,
            self.template,
            settings.history,
            device=self.device,
        )
        self.model = model
        self.id_recommender = self.encoder.id_recommender
        self.table = table.to(self.device)
        self._make_index: Callable[[Tensor], ItemIndex] = ExactIndex
        self.index: ItemIndex = ExactIndex(self.table.embeddings)
        self.by_hybrid: HybridRecommender | None = None
        if hybrid is not None:
            self.by_hybrid = HybridRecommender(items, hybrid.reading(self), settings.results, base)

    @property
    def results(self) -> dict[str, Any]:
        """What training measured; `print(recommender)` shows it as tables."""
        return self.settings.results

    @property
    def hybrid(self) -> Hybrid | None:
        """What `recommend` ranks by; None in a folder that was saved without one."""
        return None if self.by_hybrid is None else self.by_hybrid.hybrid

    def __repr__(self) -> str:
        """Name the parts, and what the language model added by the test users."""
        verdict = self.results.get("language_model", {}).get("verdict")
        ranks = "the adapter alone" if self.by_hybrid is None else repr(self.by_hybrid)
        more = f"; {verdict}" if verdict else ""
        return f"{type(self).__name__}({len(self.items)} items, {self.base.name!r}, ranks by {ranks}{more})"

    # ------------------------------------------------------------------ recommending

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        filter_seen: bool = True,
        candidates: Sequence[str] | None = None,
        on_unknown: str = "error",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        parts: str | None = None,
        explain: bool = False,
    ) -> list[Any]:
        """Recommend items by the hybrid, or those whose embeddings are nearest to each user's (paper Eqs. 3-4).

        Args:
            histories: item ids in time order, one sequence a user; an empty one is a cold start.
            k: items a user at most.
            filter_seen: leave the history's own items out.
            candidates: item ids to choose from; None is the whole catalog.
            on_unknown: `error` names item ids that are not in the catalog, `ignore` reads the history without them.
            batch_size: users a forward pass.
            show_progress_bar: show one.
            parts: `hybrid`, or `laser` for the adapter alone; None is the hybrid where there is one.
            explain: say what each part of the hybrid gives to a score.

        Returns:
            For each user, `(item_id, score)` from best to worst, the adapter's a cosine; with `explain`
            `(item_id, score, {part: share})`, whose shares add up to the score. Fewer than k where fewer are left.

        Raises:
            UnknownItemError: an id is not in the catalog.
            ConfigurationError: k below 1, unknown `parts` or `on_unknown`, or a hybrid where there is none.
        """
        k = positive("k", k)
        if parts not in (None, "hybrid", "laser") or (parts == "hybrid" and self.by_hybrid is None):
            have = "'laser'" if self.by_hybrid is None else "'hybrid' or 'laser'"
            raise ConfigurationError(f"parts must be {have}, got {parts!r}")
        by_hybrid = None if parts == "laser" else self.by_hybrid
        if explain and by_hybrid is None:
            raise ConfigurationError("explain needs the hybrid, whose parts it tells apart; the adapter has one score")
        indices = history_indices(self.items, histories, on_unknown)
        allowed = None if candidates is None else self.items.indices_of(strings(candidates, "candidates"))
        positive("batch_size", batch_size)
        users = None
        if by_hybrid is None or any(part.name == "laser" for part in by_hybrid.hybrid.parts):
            users = self._encode(indices, "user", batch_size, show_progress_bar, normalize_embeddings=True)
        if not indices:
            return []
        if by_hybrid is not None:
            return by_hybrid.ranked(indices, k, filter_seen, candidates, show_progress_bar, explain, users)
        exclude = [sorted(set(history)) for history in indices] if filter_seen else None
        return self._search(cast(Tensor, users), k, exclude, allowed)

    def without(self, part: str) -> HybridRecommender:
        """Return what ranks without `laser`, by weights that were fitted without it: no language model is in it.

        Raises:
            ConfigurationError: another part, or no hybrid.
        """
        if self.by_hybrid is None:
            raise ConfigurationError(f"there is no hybrid to leave {part!r} out of; this folder has the adapter alone")
        return HybridRecommender(self.items, self.by_hybrid.hybrid.without(part), self.results)

    @property
    def item_embeddings(self) -> Tensor:
        """The item table [I, D], as the hybrid's part `laser` reads it."""
        return self.table.embeddings

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Return embeddings [M, D] of length 1 of histories of catalog indices."""
        return self._encode(histories, "user", 32, False, normalize_embeddings=True)

    def similar_items(self, item_ids: Sequence[str], k: int = 10) -> list[list[tuple[str, float]]]:
        """Find the items nearest to given ones.

        Args:
            item_ids: ids in the catalog.
            k: items each at most, without the item itself.

        Returns:
            For each, `(item_id, cosine)` from best to worst.

        Raises:
            UnknownItemError: an id is not in the catalog.
        """
        indices = self.items.indices_of(strings(item_ids, "item_ids"))
        if not indices:
            return []
        return self._search(self.table.embeddings[indices], k, [[index] for index in indices], None)

    def use_index(self, make_index: Callable[[Tensor], ItemIndex]) -> None:
        """Search through another index than `ExactIndex`; it is made now, and anew whenever items are added.

        Args:
            make_index: makes an index of the item table's embeddings [I, D], and of the hybrid's dense parts, as
                `FaissIndex` does.

        Raises:
            ConfigurationError: from `make_index`, as all else it raises; the index in use stays.
        """
        index = make_index(self.table.embeddings)
        if self.by_hybrid is not None:
            self.by_hybrid.use_index(make_index)
        self.index, self._make_index = index, make_index

    def _search(
        self, queries: Tensor, k: int, exclude: list[list[int]] | None, candidates: list[int] | None
    ) -> list[list[tuple[str, float]]]:
        scores, found = self.index.search(queries.to(self.device), k, exclude=exclude, candidates=candidates)
        return [
            [(self.items.item_ids[index], score) for score, index in zip(row, places, strict=True) if index >= 0]
            for row, places in zip(scores.tolist(), found.tolist(), strict=True)
        ]

    # ------------------------------------------------------------------ embeddings

    def encode_users(
        self,
        histories: Sequence[Sequence[str]],
        batch_size: int = 32,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = False,
        on_unknown: str = "error",
    ) -> np.ndarray:
        """Embed users.

        Args:
            histories: item ids in time order, one sequence a user; an empty one is a cold start.
            batch_size: users a forward pass.
            show_progress_bar: show one.
            normalize_embeddings: scale each embedding to length 1.
            on_unknown: see `recommend`.

        Returns:
            [M, D] float32.

        Raises:
            UnknownItemError: an id is not in the catalog.
        """
        indices = history_indices(self.items, histories, on_unknown)
        return self._encode(indices, "user", batch_size, show_progress_bar, normalize_embeddings).numpy()

    def encode_items(
        self,
        item_ids: Sequence[str] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = False,
    ) -> np.ndarray:
        """Embed items of the catalog with the weights that encoded the item table.

        Args:
            item_ids: ids in the catalog; None is all of them.
            batch_size: items a forward pass.
            show_progress_bar: show one.
            normalize_embeddings: scale each embedding to length 1, as in the item table.

        Returns:
            [M, D] float32.

        Raises:
            UnknownItemError: an id is not in the catalog.
        """
        ids = list(self.items.item_ids) if item_ids is None else strings(item_ids, "item_ids")
        indices = [[index] for index in self.items.indices_of(ids)]
        return self._encode(indices, "item", batch_size, show_progress_bar, normalize_embeddings).numpy()

    def add_items(self, items: Iterable[Mapping[str, Any]], batch_size: int = 32) -> None:
        """Add items that training never saw: their text gives them an embedding, nothing is trained.

        Args:
            items: records with `item_id`, `title` and other attributes.
            batch_size: items a forward pass.

        Raises:
            DataError: an id is already in the catalog, or a record has none; nothing was added.
            ConfigurationError: not a list of records.
        """
        if isinstance(items, Mapping | str):
            raise ConfigurationError(f"items must be a list of records, got {short(items)}; for one item write [...]")
        known, extended = len(self.items), self.items.extended(items)
        fresh = [[index] for index in range(known, len(extended))]
        if not fresh:
            return
        encoder = self.encoder.over(extended)
        table = self.table.extended(self._encode(fresh, "item", batch_size, False, False, encoder))
        index, grown = self._make_index(table.embeddings), None
        if self.by_hybrid is not None:
            grown = self.by_hybrid.grown(extended, Embedded(table.embeddings, self.user_embeddings))
        self.items, self.encoder, self.table, self.index, self.by_hybrid = extended, encoder, table, index, grown

    def _encode(
        self,
        indices: Sequence[Sequence[int]],
        kind: str,
        batch_size: int,
        progress: bool,
        normalize_embeddings: bool,
        encoder: HistoryEncoder | None = None,
    ) -> Tensor:
        batch_size = positive("batch_size", batch_size)
        if not indices:
            return torch.zeros(0, self.table.embeddings.shape[1])
        with self._adapter(ITEM_ADAPTER if kind == "item" else USER_ADAPTER):
            embeddings = (encoder or self.encoder).encode(
                indices, kind, progress=progress, description=f"encoding {kind}s", batch_size=batch_size
            )
        return F.normalize(embeddings, dim=-1) if normalize_embeddings else embeddings

    @contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        before = self.model.active_adapter
        self.model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter(before, inference_mode=True)
