"""A part of the hybrid: features phi_f(j, h) of items and histories, and what they are made from.

Shapes: `B` rows, `I` catalog items, `d` width of a part's vectors, `M` cells.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...data import ItemCatalog
from ...errors import ConfigurationError
from ..base import IDRecommender
from ..histories import Cells, Histories

#: Validation likelihood and NDCG were best there on three catalogs (docs/hybrid.md).
SHRINKAGE = 3.0


class EmbeddingRecommender(Protocol):
    """What the part `laser` reads of a trained adapter; `LaserRecommender` is one."""

    @property
    def item_embeddings(self) -> Tensor:
        """Vectors of length 1, `[I, D]`."""

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Vectors of length 1, `[B, D]`, of histories of catalog indices."""


@dataclass(frozen=True)
class TextVectors:
    """Text of a catalog's items as vectors `[I, d]` of any length, and the name of the model that made them."""

    name: str
    vectors: np.ndarray


@dataclass
class Sources:
    """What parts are made from.

    Args:
        items: the catalog of I items.
        counts: `[I]` how often each item was bought in the sequences. Where it is 0 the parts that count are neutral.
        sequences: catalog indices of each user's events; None where a saved hybrid is loaded.
        sequence: the frozen ID recommender, or None.
        laser: the trained adapter, or None.
        text: `"tf-idf"`, vectors, or None.
        shrinkage: lambda of the whitening of text vectors.
        new: `[I]` bool, the items that nobody could have bought; None is none of them.
    """

    items: ItemCatalog
    counts: Tensor
    sequences: Sequence[Sequence[int]] | None = None
    sequence: IDRecommender | None = None
    laser: EmbeddingRecommender | None = None
    text: str | TextVectors | None = None
    shrinkage: float = SHRINKAGE
    new: Tensor | None = None

    @property
    def bought(self) -> Tensor:
        """Items with a count `[I]` bool."""
        return self.counts > 0

    def without_mean(self, vectors: Tensor) -> Tensor:
        """Take the mean over bought items off vectors `[I, d]`; items that nobody bought get it: zeros after that."""
        bought = self.bought
        centred = vectors - vectors[bought].mean(0) if bool(bought.any()) else vectors
        return centred.masked_fill(~bought[:, None], 0.0)


class Part(ABC):
    """Features of one kind, each with a weight of its own; a subclass is registered with `register_part`.

    Dense features are products `q_f(h) . v(j)` over vectors that they share; sparse ones are zero but in a few cells.
    """

    name: str
    dense: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    #: Whether it speaks of who bought what, and is 0 for items that nobody could have bought.
    counts: bool = False
    #: `[I, d]` float32, in a part with dense features.
    item_vectors: Tensor

    @property
    def features(self) -> tuple[str, ...]:
        """Names of all features, dense ones first."""
        return self.dense + self.sparse

    @classmethod
    @abstractmethod
    def fit(cls, sources: Sources) -> "Part | None":
        """Make the part, or None where its source is not there."""

    def queries(self, histories: Histories) -> Tensor:
        """Return q of each dense feature, `[dense, B, d]` float32."""
        raise NotImplementedError

    def cells(self, histories: Histories) -> Cells:
        """Return the cells of the sparse features, values `[M, sparse]`."""
        raise NotImplementedError

    def extended(self, sources: Sources, num_known: int) -> "Part":
        """Return the part for a catalog whose items from `num_known` on are new."""
        return self.load(self.tensors(), sources)

    def tensors(self) -> dict[str, Tensor]:
        """Return what has to be saved to load the part again."""
        return {}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], sources: Sources) -> "Part":
        """Make the part from what `tensors` returned and the sources, which have no sequences now."""
        part = cls.fit(sources)
        if part is None:
            raise ConfigurationError(f"the hybrid's part {cls.name} needs its source, which was not given")
        return part


PARTS: dict[str, type[Part]] = {}
PartT = TypeVar("PartT", bound=type[Part])


def register_part(name: str) -> Callable[[PartT], PartT]:
    """Let `Hybrid.fit` and saved hybrids know a part by name; a name that is taken is a `ConfigurationError`."""

    def register(part: PartT) -> PartT:
        if name in PARTS:
            raise ConfigurationError(f"a part's name must be free, got {name!r}, which {PARTS[name].__name__} has")
        part.name = name
        PARTS[name] = part
        return part

    return register


def column(cells: Cells) -> Cells:
    """Return cells of one feature as those of a part with one sparse feature."""
    return cells._replace(values=cells.values[:, None])


def phi(part: Part, histories: Histories) -> Tensor:
    """Return all features as they are defined, `[B, I, F]` float32: for small catalogs, and to check the rest by."""
    layers = []
    if part.dense:
        layers.append((part.queries(histories) @ part.item_vectors.T).permute(1, 2, 0))  # [B, I, dense]
    if part.sparse:
        cells = part.cells(histories)
        matrix = torch.zeros(len(histories), histories.num_items, len(part.sparse))
        matrix[torch.from_numpy(cells.rows), torch.from_numpy(cells.items)] = torch.from_numpy(cells.values).float()
        layers.append(matrix)
    return torch.cat(layers, dim=2)
