"""The saved recommender: into one folder, out of it, and to the Hub."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor

from ..base_models import BaseModel
from ..catalog.item_table import ItemTable
from ..data import ItemCatalog, PromptTemplate
from ..errors import ConfigurationError
from ..recommenders import Hybrid, IDRecommender
from . import hub
from .folder import (
    LaserSettings,
    SavedParts,
    has_hybrid,
    load_adapters,
    load_base,
    read_folder,
    read_hybrid,
    write_folder,
)


@dataclass(frozen=True)
class Embedded:
    """What the part `laser` reads before its recommender is there."""

    item_embeddings: Tensor
    encode: Callable[[Sequence[Sequence[int]]], Tensor] | None = None

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Encode users, by the recommender."""
        if self.encode is None:
            raise ConfigurationError("this hybrid is not yet part of a recommender that embeds users")
        return self.encode(histories)


class SavedRecommender:
    """What `LaserRecommender` does with files; its constructor takes what a folder holds."""

    model: PeftModel
    items: ItemCatalog
    table: ItemTable
    template: PromptTemplate
    id_recommender: IDRecommender | None
    settings: LaserSettings

    def __init__(self, *parts: Any) -> None:
        raise NotImplementedError

    @property
    def hybrid(self) -> Hybrid | None:
        """What ranks, or None."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, repo_id: str | None = None) -> None:
        """Write everything into one folder: safetensors, JSON and a model card.

        Args:
            save_directory: the folder; files of an earlier save are replaced, others left.
            repo_id: the Hub repository that the model card's example loads; None loads the folder.
        """
        settings = replace(self.settings, table_checksum=self.table.checksum())
        parts = SavedParts(settings, self.template, self.items, self.table, self.id_recommender, self.hybrid)
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
    ) -> Self:
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
        table, hybrid = parts.table, None
        if has_hybrid(folder):
            hybrid = read_hybrid(folder, parts.items, parts.id_recommender, Embedded(table.embeddings))
        return cls(
            base, model, parts.items, table, parts.template, parts.id_recommender, parts.settings, device, hybrid
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
