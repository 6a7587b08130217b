"""Item embeddings made elsewhere (RecBole, RecTools, implicit ...) as a frozen recommender."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..artifacts import whole_file, write_whole
from ..errors import ArtifactError, InputError
from .base import IDRecommender
from .saving import CONFIG_FILE, WEIGHTS_FILE, fill_weights, read_config


class Precomputed(IDRecommender):
    """A table of item embeddings; an item's state is its row, whatever stands around it.

    Args:
        embeddings: `[I, C]` finite real numbers, numpy, torch or nested lists; row = catalog index. Kept as float32.
        max_length: Longest history used.

    Raises:
        InputError: The shape is not `[I, C]`, or a row holds NaN or infinity (the first such rows are named).
    """

    recommender_type = "precomputed"
    embeddings: Tensor

    def __init__(self, embeddings: Any, max_length: int = 50) -> None:
        super().__init__()
        if not isinstance(embeddings, torch.Tensor):
            try:
                embeddings = torch.from_numpy(np.array(embeddings, dtype=np.float32))
            except (TypeError, ValueError) as error:
                raise InputError(f"embeddings must be an array [items, width] of real numbers: {error}") from error
        table = embeddings.detach().to(torch.float32).clone()
        if table.ndim != 2 or 0 in table.shape:
            raise InputError(f"embeddings must have shape [items, width], got {list(table.shape)}")
        bad = (~table.isfinite()).any(1).nonzero()[:, 0]
        if len(bad):
            raise InputError(
                f"embeddings must be finite, got NaN or infinity in {len(bad)} of {len(table)} rows, "
                f"first in rows {bad[:5].tolist()}; leave these items out or fill them in"
            )
        if max_length < 1:
            raise InputError(f"max_length must be at least 1, got {max_length!r}")
        self.register_buffer("embeddings", table)
        self.num_items, self.embedding_dim = table.shape
        self.max_length = max_length

    @property
    def item_weights(self) -> Tensor:
        """The embeddings [I, C]."""
        return self.embeddings

    def essentials(self) -> dict[str, Any]:
        """Return the settings that decide what the weights compute."""
        return {"num_items": self.num_items, "embedding_dim": self.embedding_dim, "max_length": self.max_length}

    def _encode_packed(self, item_indices: Tensor, lengths: Tensor) -> Tensor:
        return self.embeddings[item_indices]  # [B, L, C]

    @torch.no_grad()
    def queries(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the history's embeddings [B, C]; that of an empty history is zero."""
        states, encoded = self.read(item_indices, mask)
        return states.sum(1) / encoded.sum(1, keepdim=True).clamp(min=1)

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> None:
        """Write `config.json` and `model.safetensors`; other arguments are those of all recommenders."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / WEIGHTS_FILE) as temporary:
            save_file({"embeddings": self.embeddings.cpu().contiguous()}, temporary, metadata={"format": "pt"})
        config = {"model_type": self.recommender_type, **self.essentials()}
        write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Precomputed":
        """Load what `save_pretrained` wrote; an ArtifactError or InputError says what is wrong with it."""
        config = read_config(folder)
        try:
            shape = int(config["num_items"]), int(config["embedding_dim"])
            recommender = cls(torch.zeros(shape), max_length=int(config["max_length"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{Path(folder) / CONFIG_FILE} does not describe a table of embeddings: {error}"
            ) from error
        fill_weights(recommender, Path(folder))
        return cls(recommender.embeddings, max_length=recommender.max_length).eval()
