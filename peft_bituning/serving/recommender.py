"""`LaserRecommender`: a trained adapter with everything it needs to recommend, in one folder."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..base_models import BaseModel, check_same_base, load_base_model
from ..catalog.encoder import HistoryEncoder
from ..catalog.index import ExactIndex
from ..catalog.item_table import ItemTable
from ..data import ItemCatalog, PromptEncoder, PromptTemplate
from ..data.collator import HistoryCollator
from ..errors import ArtifactError, ConfigurationError, UnknownItemError
from ..recommenders import IDRecommender, load_recommender
from . import hub
from .card import write_card
from .manifest import check_manifest, write_manifest

logger = logging.getLogger(__name__)

SETTINGS_FILE = "laser.json"
TEMPLATE_FILE = "template.json"
ITEMS_FILE = "catalog/items.jsonl"
TABLE_FILE = "catalog/item_table.safetensors"
RECOMMENDER_FOLDER = "recommender"
USER_ADAPTER = "default"
ITEM_ADAPTER = "items"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LaserSettings:
    """What a saved recommender remembers beside tensors.

    Args:
        base_model: name, revision and fingerprint of the language model.
        max_length: tokens of a prompt at most.
        max_history: items of a prompt at most, or None.
        max_item_tokens: tokens of an item at most, or None.
        max_collaborative_items: items of a history that the ID recommender reads at most.
        recommender_hash: content hash of the ID recommender, or None without one.
        table_checksum: sha256 of the item table.
        results: metrics and counts for the model card.
        version: version of this package.
        format_version: version of this file's layout.
    """

    base_model: dict[str, Any]
    max_length: int
    max_history: int | None
    max_item_tokens: int | None
    max_collaborative_items: int
    recommender_hash: str | None
    table_checksum: str
    results: dict[str, Any]
    version: str
    format_version: int = FORMAT_VERSION


class LaserRecommender:
    """Recommends items for purchase histories; load one with `from_pretrained`, train one with `training.fit`.

    Args:
        base: the frozen language model.
        model: the PEFT model with the adapters `default` (users, A') and `items` (the item table's, A).
        items: the catalog.
        table: the item table, in catalog order.
        template: the prompt template.
        recommender: the frozen ID recommender, or None where the prefix encoder needs none.
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
        recommender: IDRecommender | None,
        settings: LaserSettings,
        device: torch.device | str | None = None,
    ) -> None:
        if len(table) != len(items):
            raise ConfigurationError(f"the item table must have {len(items)} rows, one an item, got {len(table)}")
        self.base = base
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.recommender = None if recommender is None else recommender.to(self.device).eval()
        self.template = template
        self.settings = settings
        self.items = items
        self.table = table.to(self.device)
        self._bind()

    def _bind(self) -> None:
        """Rebuild what depends on the catalog."""
        settings = self.settings
        prompts = PromptEncoder(
            self.template,
            self.base.tokenizer,
            self.items,
            settings.max_length,
            settings.max_history,
            settings.max_item_tokens,
        )
        collator = HistoryCollator(prompts, pad_token_id(self.base.tokenizer), settings.max_collaborative_items)
        self.encoder = HistoryEncoder(self.model, collator, self.recommender, self.device)
        self.index = ExactIndex(self.table.embeddings)

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
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigurationError(f"k must be an integer >= 1, got {k!r}")
        indices = self._indices(histories, on_unknown)
        allowed = None if candidates is None else self.items.indices_of(list(candidates))
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
            DataError: an id is already in the catalog, or a record has none.
        """
        known = len(self.items)
        extended = self.items.extended(items)
        before = self.items
        self.items = extended
        try:
            self._bind_catalog_only()
            fresh = [[index] for index in range(known, len(extended))]
            if fresh:
                self.table = self.table.extended(self._encode(fresh, "item", batch_size, False, False))
        except BaseException:
            self.items = before
            self._bind()
            raise
        self._bind()

    def _bind_catalog_only(self) -> None:
        prompts = self.encoder.collator.prompts
        self.encoder.collator.prompts = PromptEncoder(
            self.template,
            self.base.tokenizer,
            self.items,
            prompts.max_length,
            prompts.max_items,
            prompts.max_item_tokens,
        )

    def _encode(
        self, indices: Sequence[Sequence[int]], kind: str, batch_size: int, progress: bool, normalize_embeddings: bool
    ) -> Tensor:
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        self.encoder.batch_size = batch_size
        with self._adapter(ITEM_ADAPTER if kind == "item" else USER_ADAPTER):
            embeddings = self.encoder.encode(indices, kind, progress=progress, description=f"encoding {kind}s")
        return F.normalize(embeddings, dim=-1) if normalize_embeddings and len(embeddings) else embeddings

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
                f"histories must be a list of lists of item ids, got {histories!r}; for one user write [[...]]"
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
        folder = Path(save_directory)
        (folder / "catalog").mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        self.items.to_jsonl(folder / ITEMS_FILE)
        self.table.save(folder / TABLE_FILE)
        (folder / TEMPLATE_FILE).write_text(self.template.to_json() + "\n", encoding="utf-8")
        settings = replace(self.settings, table_checksum=self.table.checksum())
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
        names = [ITEMS_FILE, TABLE_FILE, TEMPLATE_FILE, SETTINGS_FILE]
        if self.recommender is not None:
            self.recommender.save_pretrained(folder / RECOMMENDER_FOLDER)
            names += [f"{RECOMMENDER_FOLDER}/{name}" for name in ("config.json", "model.safetensors")]
        for prefix in ("", f"{ITEM_ADAPTER}/"):
            names += [f"{prefix}{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
        (folder / ITEM_ADAPTER / "README.md").unlink(missing_ok=True)
        write_card(
            folder / "README.md", settings.results, settings.base_model, self.template, self.items, repo_id or "."
        )
        write_manifest(folder, [*names, "README.md"])

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
        """
        folder = Path(path_or_repo)
        if not folder.is_dir():
            folder = hub.download(str(path_or_repo), revision=revision, token=token)
        check_manifest(folder)
        settings = _read_settings(folder / SETTINGS_FILE)
        template = PromptTemplate.from_json((folder / TEMPLATE_FILE).read_text(encoding="utf-8"))
        items = ItemCatalog.from_jsonl(folder / ITEMS_FILE)
        table = ItemTable.load(folder / TABLE_FILE, len(items))
        if table.checksum() != settings.table_checksum:
            raise ArtifactError(
                f"{TABLE_FILE} is not the table that {SETTINGS_FILE} names (sha256 differs); they are from two saves, "
                "save or download the folder again"
            )
        recommender = None
        if settings.recommender_hash is not None:
            recommender = load_recommender(folder / RECOMMENDER_FOLDER)
            if recommender.content_hash() != settings.recommender_hash:
                raise ArtifactError(
                    f"the ID recommender in {RECOMMENDER_FOLDER}/ is not the one the adapter was trained with (hash "
                    f"{recommender.content_hash()[:12]}, trained with {settings.recommender_hash[:12]}); restore the "
                    "original, an adapter cannot read another recommender's embeddings"
                )
        recorded = settings.base_model
        base = load_base_model(
            base_model or recorded["name"], dtype, None if base_model is not None else recorded.get("revision")
        )
        check_same_base(base, recorded["name"], recorded["fingerprint"])
        model = PeftModel.from_pretrained(base.model, str(folder), adapter_name=USER_ADAPTER)
        model.load_adapter(str(folder / ITEM_ADAPTER), adapter_name=ITEM_ADAPTER)
        return cls(base, model, items, table, template, recommender, settings, device)

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


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token id to fill padding with; its value is inert."""
    return next((int(value) for value in (tokenizer.pad_token_id, tokenizer.eos_token_id) if value is not None), 0)


def _read_settings(path: Path) -> LaserSettings:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        settings = LaserSettings(**values)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path.name} cannot be read ({error}); it is damaged or from another version") from error
    if settings.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path.name} must have format_version {FORMAT_VERSION}, got {settings.format_version}; use the version of "
            f"peft_bituning that saved it ({settings.version})"
        )
    return settings


def _strings(values: Sequence[str], name: str) -> list[str]:
    if isinstance(values, str):
        raise ConfigurationError(f"{name} must be a list of item ids, got {values!r}; for one item write [{values!r}]")
    return [str(value) for value in values]
