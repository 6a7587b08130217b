"""`LaserRecommender`: a trained adapter with everything it needs to recommend, in one folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
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
from ..errors import ConfigurationError, UnknownItemError
from ..recommenders import IDRecommender
from ..tuners.rows.embedding_model import EmbeddingModel
from . import hub
from .folder import (
    ITEM_ADAPTER,
    USER_ADAPTER,
    LaserSettings,
    SavedParts,
    load_adapters,
    load_base,
    read_folder,
    write_folder,
)


class LaserRecommender:
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
    ) -> list[list[tuple[str, float]]]:
        """Recommend the items whose embeddings are nearest to each user's (paper Eqs. 3-4).

        Args:
            histories: item ids in time order, one sequence a user; an empty one is a cold start.
            k: items a user at most.
            filter_seen: leave the history's own items out.
            candidates: item ids to choose from; None is the whole catalog.
            on_unknown: `error` names item ids that are not in the catalog, `ignore` reads the history without them.
            batch_size: users a forward pass.
            show_progress_bar: show one.

        Returns:
            For each user, `(item_id, cosine)` from best to worst; fewer than k where fewer are left.

        Raises:
            UnknownItemError: an id is not in the catalog.
            ConfigurationError: k below 1, or an unknown `on_unknown`.
        """
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise ConfigurationError(f"k must be an integer >= 1, got {k!r}")
        indices = self._indices(histories, on_unknown)
        allowed = None if candidates is None else self.items.indices_of(_strings(candidates, "candidates"))
        users = self._encode(indices, "user", batch_size, show_progress_bar, normalize_embeddings=True)
        if not indices:
            return []
        exclude = [sorted(set(history)) for history in indices] if filter_seen else None
        return self._search(users, k, exclude, allowed)

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
        indices = self.items.indices_of(_strings(item_ids, "item_ids"))
        if not indices:
            return []
        return self._search(self.table.embeddings[indices], k, [[index] for index in indices], None)

    def use_index(self, make_index: Callable[[Tensor], ItemIndex]) -> None:
        """Search through another index than `ExactIndex`; it is made now, and anew whenever items are added.

        Args:
            make_index: makes an index of the item table's embeddings [I, D], as `FaissIndex` does.

        Raises:
            ConfigurationError: from `make_index`, as all else it raises; the index in use stays.
        """
        self.index = make_index(self.table.embeddings)
        self._make_index = make_index

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
        indices = self._indices(histories, on_unknown)
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
        ids = list(self.items.item_ids) if item_ids is None else _strings(item_ids, "item_ids")
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
            raise ConfigurationError(f"items must be a list of records, got {_short(items)}; for one item write [...]")
        known, extended = len(self.items), self.items.extended(items)
        fresh = [[index] for index in range(known, len(extended))]
        if not fresh:
            return
        encoder = self.encoder.over(extended)
        table = self.table.extended(self._encode(fresh, "item", batch_size, False, False, encoder))
        index = self._make_index(table.embeddings)
        self.items, self.encoder, self.table, self.index = extended, encoder, table, index

    def _encode(
        self,
        indices: Sequence[Sequence[int]],
        kind: str,
        batch_size: int,
        progress: bool,
        normalize_embeddings: bool,
        encoder: HistoryEncoder | None = None,
    ) -> Tensor:
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise ConfigurationError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        if not indices:
            return torch.zeros(0, self.table.embeddings.shape[1])
        with self._adapter(ITEM_ADAPTER if kind == "item" else USER_ADAPTER):
            embeddings = (encoder or self.encoder).encode(
                indices, kind, progress=progress, description=f"encoding {kind}s", batch_size=int(batch_size)
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

    def _indices(self, histories: Sequence[Sequence[str]], on_unknown: str) -> list[list[int]]:
        if on_unknown not in ("error", "ignore"):
            raise ConfigurationError(f"on_unknown must be 'error' or 'ignore', got {on_unknown!r}")
        if isinstance(histories, str) or any(isinstance(history, str) for history in histories):
            raise ConfigurationError(
                f"histories must be a list of lists of item ids, got {_short(histories)}; for one user write [[...]]"
            )
        index = self.items.index
        unknown = sorted({str(item) for history in histories for item in history if str(item) not in index})
        if unknown and on_unknown == "error":
            raise UnknownItemError(
                f"{len(unknown)} item ids are not in the catalog: {', '.join(unknown[:10])}; add them with add_items, "
                "or leave them out with on_unknown='ignore'"
            )
        return [[index[str(item)] for item in history if str(item) in index] for history in histories]

    # ------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str | Path, repo_id: str | None = None) -> None:
        """Write everything into one folder: safetensors, JSON and a model card.

        Args:
            save_directory: the folder; files of an earlier save are replaced, others left.
            repo_id: the Hub repository that the model card's example loads; None loads the folder.
        """
        settings = replace(self.settings, table_checksum=self.table.checksum())
        parts = SavedParts(settings, self.template, self.items, self.table, self.id_recommender)
        write_folder(Path(save_directory), self.model, parts, repo_id)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        base_model: str | Path | BaseModel | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "LaserRecommender":
        """Load a saved recommender with nothing else at hand.

        Args:
            path_or_repo: a folder, or a Hub repository.
            base_model: the language model where its recorded name does not resolve here: a local folder, an alias,
                or a loaded `BaseModel` (4-bit, say).
            device: where to run; None takes CUDA where there is one.
            revision: commit, branch or tag of the repository.
            token: Hub token.
            dtype: type of the frozen weights.

        Returns:
            The recommender.

        Raises:
            ArtifactError: a file is missing, changed, or belongs to something else.
            AdapterLoadError: adapter tensors do not fit.
            ConfigurationError: the language model cannot be loaded, or carries an adapter already.
        """
        folder = Path(path_or_repo)
        if not folder.is_dir():
            folder = hub.download(str(path_or_repo), revision=revision, token=token)
        parts = read_folder(folder)
        base = load_base(parts.settings, base_model, dtype)
        model = load_adapters(base, folder)
        return cls(
            base, model, parts.items, parts.table, parts.template, parts.id_recommender, parts.settings, device=device
        )

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload LaserRecommender",
        create_pr: bool = False,
    ) -> str:
        """Upload the saved folder to the Hub; `PeftModel.from_pretrained` loads the same repository.

        Args:
            repo_id: `user/name`; it is created where it does not exist.
            private: whether a new repository is private; None leaves it to the account.
            token: Hub token.
            commit_message: first line of the commit.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the commit.
        """
        return hub.upload(
            lambda folder: self.save_pretrained(folder, repo_id), repo_id, private, token, commit_message, create_pr
        )


def _strings(values: Sequence[str], name: str) -> list[str]:
    if isinstance(values, str):
        raise ConfigurationError(f"{name} must be a list of item ids, got {values!r}; for one item write [{values!r}]")
    return [str(value) for value in values]


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
