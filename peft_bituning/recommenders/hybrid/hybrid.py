"""The hybrid: a weighted sum of parts, whose weights are fitted on validation users.

Shapes: `B` rows, `N` history length, `I` catalog items, `d` width of all dense vectors laid end to end, `M` cells.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...artifacts import sha256_of_tensors, whole_file, write_whole
from ...data import ItemCatalog, LeaveOneOut, Sample
from ...errors import ArtifactError, ConfigurationError
from ..base import IDRecommender
from ..histories import Cells, Histories
from ..loading import load_recommender
from .choices import draw_choices
from .new_items import OFFSET, SCALE, fit_new_items
from .part import PARTS, SHRINKAGE, EmbeddingRecommender, Part, Sources, TextVectors
from .weights import fit_supported

TENSORS_FILE = "hybrid.safetensors"
SETTINGS_FILE = "hybrid.json"
SEQUENCE_FOLDER = "sequence"
LASER = "laser"
FORMAT_VERSION = 1


class Hybrid:
    """Scores items by `sum over features of w_f phi_f(j, h)`; `Hybrid.fit` makes one.

    `P(j | h) = softmax of the scores`, whose weights are of maximum likelihood on users that no part was fitted on.
    With a `laser` part there are two sets of weights, fitted with and without it: see `without`.

    Args:
        parts: the parts, each once.
        weights: by feature; a part none of whose features has one is dropped.
        sources: what the parts were made from.
        weights_without_laser: those fitted without the part `laser`, where there is one.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Mapping[str, float],
        sources: Sources,
        weights_without_laser: Mapping[str, float] | None = None,
    ) -> None:
        self.fitted_parts = list(parts)  # with and without a weight
        self.parts = [part for part in parts if any(weights.get(name) for name in part.features)]
        named = [*(name for part in self.parts for name in part.features), OFFSET, SCALE]
        self.weights = {name: weights[name] for name in named if name in weights}
        self.sources = sources
        self.new = torch.zeros(len(sources.items), dtype=torch.bool) if sources.new is None else sources.new
        self._offset = float(weights.get(OFFSET, 0.0)) * self.new.float()  # [I]
        self._scale = torch.where(self.new, float(weights.get(SCALE, 1.0)), 1.0)  # [I]
        self.weights_without_laser = None if weights_without_laser is None else dict(weights_without_laser)

    # ------------------------------------------------------------------ fitting

    @classmethod
    def fit(
        cls,
        split: LeaveOneOut,
        items: ItemCatalog,
        sequence: IDRecommender | None = None,
        laser: EmbeddingRecommender | None = None,
        text: str | np.ndarray | Tensor | TextVectors | None = "tf-idf",
        parts: Sequence[str] | None = None,
        shrinkage: float = SHRINKAGE,
        seed: int = 0,
        samples: Sequence[Sample] | None = None,
    ) -> "Hybrid":
        """Fit the weights on the validation users; then let the counts take in the validation events.

        Args:
            split: who bought what.
            items: the catalog of I items.
            sequence: the frozen ID recommender, trained on `split`'s training events; None leaves its part out.
            laser: a trained adapter, likewise.
            text: `tf-idf`, vectors `[I, d]`, `TextVectors`, or None.
            parts: names of the parts to fit, of those that are registered; None is all of them.
            shrinkage: lambda of the whitening of text vectors.
            seed: of the items and users that are drawn where there are very many.
            samples: validation users to fit on; None is all of `split`.

        Returns:
            The hybrid; a part that the data do not support has no weight.

        Raises:
            ConfigurationError: an unknown part, or sources of another catalog.
        """
        if not (text is None or isinstance(text, str | TextVectors)):
            text = TextVectors("vectors", np.asarray(text))
        if sequence is not None and sequence.num_items != len(items):
            raise ConfigurationError(f"sequence must know the catalog's {len(items)} items, got {sequence.num_items}")
        names = list(PARTS if parts is None else dict.fromkeys(parts))
        if unknown := sorted(set(names) - set(PARTS)):
            raise ConfigurationError(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
        known, new = split.train_sequences, torch.zeros(len(items), dtype=torch.bool)
        new[sorted(split.held_out_items)] = True
        sources = Sources(items, counts_of(known, len(items)), known, sequence, laser, text, shrinkage, new)
        fitted = _fit_parts(names, sources)
        choices = draw_choices(fitted, split.samples("valid") if samples is None else samples, sources.counts, seed)
        features = {part.name: part.features for part in fitted}
        supported = fit_supported(choices, features, [LASER]).weights
        supported |= fit_new_items(choices, fitted, supported, len(items), seed)
        without: dict[str, float] | None = None
        if LASER in features:
            others = [place for place, name in enumerate(n for f in features.values() for n in f) if name != LASER]
            left = {name: names for name, names in features.items() if name != LASER}
            without = fit_supported(choices.among(others), left).weights
            without |= fit_new_items(choices, fitted, without, len(items), seed)
        known = split.known_sequences
        sources = replace(sources, counts=counts_of(known, len(items)), sequences=known)
        texts = [part for part in fitted if part.name == "text"]  # which no event changes
        rest = _fit_parts([name for name in names if name != "text"], sources)
        return cls(texts + rest, supported, sources, without)

    # ------------------------------------------------------------------ scoring

    @property
    def num_items(self) -> int:
        """Catalog size I."""
        return len(self.sources.items)

    @property
    def item_vectors(self) -> Tensor:
        """The dense parts' vectors laid end to end `[I, d]`."""
        vectors = [part.item_vectors for part in self.parts if part.dense]
        if not self.new.any():
            return torch.cat(vectors, dim=1) if vectors else torch.zeros(self.num_items, 1)
        scaled = [each * self._scale[:, None] for each in vectors]
        return torch.cat([*scaled, self._offset[:, None]], dim=1)

    def queries(self, histories: Histories) -> Tensor:
        """Return the vectors `[B, d]` whose products with `item_vectors` are the dense parts' share of the scores."""
        found = [self._weighted(part, histories) for part in self.parts if part.dense]
        if self.new.any() or not found:
            found.append(torch.ones(len(histories), 1))  # for the offset of new items
        return torch.cat(found, dim=1)

    def _weighted(self, part: Part, histories: Histories) -> Tensor:
        """Return the sum of a part's queries `[B, d]`, each by its weight."""
        weights = torch.tensor([self.weights.get(name, 0.0) for name in part.dense])
        return torch.einsum("f,fbd->bd", weights, part.queries(histories))

    def cells(self, histories: Histories) -> Cells:
        """Return the sparse parts' share of the scores, where it is not 0."""
        found = [(part, part.cells(histories)) for part in self.parts if part.sparse]
        weights = [np.array([self.weights.get(name, 0.0) for name in part.sparse]) for part, _ in found]
        empty = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
        each = [(cells.rows, cells.items, cells.values @ by) for (_, cells), by in zip(found, weights, strict=True)]
        rows, items, values = (np.concatenate(column) for column in zip(*(each or empty), strict=True))
        return histories.summed(rows, items, values * self._scale.numpy()[items])

    @torch.no_grad()
    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Score every item: `[B, N]` catalog indices, oldest first, and their mask -> `[B, I]` float32."""
        histories = self.histories(item_indices, mask)
        scores = torch.zeros(len(histories), self.num_items)
        for part in self.parts:
            if part.dense:
                scores += self._weighted(part, histories) @ part.item_vectors.T
        scores = scores * self._scale + self._offset
        cells = self.cells(histories)
        scores[torch.from_numpy(cells.rows), torch.from_numpy(cells.items)] += torch.from_numpy(cells.values).float()
        return scores

    @torch.no_grad()
    def contributions(self, item_indices: Tensor, mask: Tensor, items: Tensor | None = None) -> dict[str, Tensor]:
        """Say what each part gives to items `[B, K]`, `[B, K]` float64 by the parts' names; the scores are their sum.

        Other arguments as in `scores`; items are catalog indices, None is all I; those below 0 get 0.
        """
        items = torch.arange(self.num_items).expand(len(item_indices), -1) if items is None else items
        return self.shares(self.histories(item_indices, mask), items)

    @torch.no_grad()
    def shares(self, histories: Histories, items: Tensor) -> dict[str, Tensor]:
        """Return the contributions to items `[B, K]` of histories that are read already."""
        real = items >= 0
        places = items.clamp(min=0)
        found: dict[str, Tensor] = {}
        for part in self.parts:
            share = torch.zeros(items.shape, dtype=torch.float64)
            if part.dense:
                queries = self._weighted(part, histories).double()
                share += torch.einsum("bd,bkd->bk", queries, part.item_vectors[places].double())
            if part.sparse:
                cells = part.cells(histories)
                by = np.array([self.weights.get(name, 0.0) for name in part.sparse])
                keys = np.append(cells.rows * self.num_items + cells.items, np.iinfo(np.int64).max)
                wanted = (np.arange(len(histories))[:, None] * self.num_items) + places.numpy()
                at = np.searchsorted(keys, wanted)
                values = np.append(cells.values @ by, 0.0)[at]
                share += torch.from_numpy(np.where(keys[at] == wanted, values, 0.0))
            found[part.name] = (share * self._scale[places]).masked_fill(~real, 0.0)
        if self.new.any():
            found["new"] = self._offset[places].double().masked_fill(~real, 0.0)
        return found

    def histories(self, item_indices: Tensor, mask: Tensor) -> Histories:
        """Return histories as the parts read them; an InputError says that shapes do not fit."""
        return Histories(item_indices.cpu(), mask.cpu(), self.num_items)

    # ------------------------------------------------------------------ other hybrids

    def without(self, name: str) -> "Hybrid":
        """Return the hybrid without its part `laser`, by the weights that were fitted without it.

        Raises:
            ConfigurationError: another part, of which there are no such weights.
        """
        if name != LASER:
            raise ConfigurationError(f"only {LASER!r} can be left out after fitting, got {name!r}; fit with parts=")
        if self.weights_without_laser is None:
            return self
        parts = [part for part in self.fitted_parts if part.name != LASER]
        return Hybrid(parts, self.weights_without_laser, replace(self.sources, laser=None))

    def reading(self, laser: EmbeddingRecommender) -> "Hybrid":
        """Return the hybrid whose part `laser` reads another adapter, which knows the same items."""
        sources = replace(self.sources, laser=laser)
        parts = [part.load({}, sources) if part.name == LASER else part for part in self.fitted_parts]
        return Hybrid(parts, self.weights, sources, self.weights_without_laser)

    def extended(
        self, items: ItemCatalog, text: np.ndarray | None = None, laser: EmbeddingRecommender | None = None
    ) -> "Hybrid":
        """Return the hybrid of a catalog with new items at its end: they have text, no counts, and their own scale.

        Args:
            items: the whole catalog.
            text: vectors of the new items `[J, d]` by the model that made the others'; not needed with tf-idf.
            laser: the adapter, which embeds the new items; None keeps the one at hand.
        """
        known = self.num_items
        grown = torch.cat([self.sources.counts, self.sources.counts.new_zeros(len(items) - known)])
        name = self.text_model or ""
        vectors = None if text is None else TextVectors(name, text)
        laser = self.sources.laser if laser is None else laser
        new = torch.cat([self.new, torch.ones(len(items) - known, dtype=torch.bool)])
        sources = replace(self.sources, items=items, counts=grown, sequences=None, text=vectors, laser=laser, new=new)
        parts = [part.extended(sources, known) for part in self.fitted_parts]
        kept = replace(sources, text=self.sources.text)
        return Hybrid(parts, self.weights, kept, self.weights_without_laser)

    @property
    def text_model(self) -> str | None:
        """What the texts' likeness comes from: `tf-idf`, the name of a model, or None."""
        return self.sources.text.name if isinstance(self.sources.text, TextVectors) else self.sources.text

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but the weights, the ID recommender and the adapter."""
        found = {"counts": self.sources.counts, "new": self.new}
        for part in self._needed():
            found |= {f"{part.name}.{name}": tensor.contiguous() for name, tensor in part.tensors().items()}
        return found

    def settings(self) -> dict[str, Any]:
        """Return the rest as JSON values."""
        sequence = self.sources.sequence if any(part.name == SEQUENCE_FOLDER for part in self._needed()) else None
        return {
            "format_version": FORMAT_VERSION,
            "parts": [part.name for part in self._needed()],
            "weights": self.weights,
            "weights_without_laser": self.weights_without_laser,
            "text_model": self.text_model,
            "shrinkage": self.sources.shrinkage,
            "sequence": None if sequence is None else sequence.content_hash(),
        }

    def content_hash(self) -> str:
        """Return the sha256 (hex) over settings and tensors."""
        return sha256_of_tensors(self.tensors(), "\n{name} {shape} {dtype}\n", json.dumps(self.settings()))

    def save_pretrained(self, folder: str | Path, with_sequence: bool = True) -> None:
        """Write safetensors and JSON; the adapter of a `laser` part has a folder of its own.

        Args:
            folder: where to.
            with_sequence: write the ID recommender beside them; else it has to be given when loading.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.settings()
        if with_sequence and settings["sequence"] is not None and self.sources.sequence is not None:
            self.sources.sequence.save_pretrained(folder / SEQUENCE_FOLDER)
        with whole_file(folder / TENSORS_FILE) as temporary:
            save_file(self.tensors(), temporary)
        write_whole(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        items: ItemCatalog,
        sequence: IDRecommender | None = None,
        laser: EmbeddingRecommender | None = None,
    ) -> "Hybrid":
        """Load what `save_pretrained` wrote.

        Args:
            folder: the folder.
            items: the catalog.
            sequence: the ID recommender, where it is not in the folder.
            laser: the adapter of the part `laser`; without it the hybrid ranks by the weights fitted without.

        Raises:
            ArtifactError: a file is missing or damaged, or belongs to another catalog or ID recommender.
        """
        folder = Path(folder)
        try:
            settings = dict(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
            tensors = load_file(folder / TENSORS_FILE)
            if settings["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version must be {FORMAT_VERSION}, got {settings['format_version']!r}")
            names, weights = list(settings["parts"]), _numbers(settings["weights"])
            rest = settings["weights_without_laser"]
            without = None if rest is None else _numbers(rest)
            counts, new, expected = tensors.pop("counts"), tensors.pop("new"), settings["sequence"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ArtifactError(f"the hybrid in {folder.name} cannot be read ({error}); save it again") from error
        if not counts.shape == new.shape == (len(items),) or not set(names) <= set(PARTS):
            raise ArtifactError(
                f"the hybrid in {folder.name} must be of {len(items)} items and of parts that are registered "
                f"({', '.join(PARTS)}), got {list(counts.shape)} items and {', '.join(names)}"
            )
        if expected is not None:
            sequence = load_recommender(folder / SEQUENCE_FOLDER) if sequence is None else sequence
            if sequence.content_hash() != expected:
                raise ArtifactError("the ID recommender is not the one that the hybrid was fitted with; restore it")
        if laser is None and without is not None:
            names, weights, without = [name for name in names if name != LASER], without, None
        model = settings.get("text_model")
        text = model if model in (None, "tf-idf") else TextVectors(str(model), np.zeros((0, 0)))
        shrinkage = float(settings.get("shrinkage", SHRINKAGE))
        sources = Sources(items, counts, None, sequence, laser, text, shrinkage, new.bool())
        parts = [
            PARTS[name].load(
                {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")},
                sources,
            )
            for name in names
        ]
        return cls(parts, weights, sources, without)

    def _needed(self) -> list[Part]:
        """Parts that have a weight, with `laser` or without it."""
        weights = {**self.weights, **(self.weights_without_laser or {})}
        return [part for part in self.fitted_parts if any(name in weights for name in part.features)]


def counts_of(sequences: Sequence[Sequence[int]], num_items: int) -> Tensor:
    """Return how often each item occurs `[I]` float32."""
    events = np.fromiter((item for sequence in sequences for item in sequence), dtype=np.int64)
    return torch.from_numpy(np.bincount(events, minlength=num_items).astype(np.float32))


def _fit_parts(names: Sequence[str], sources: Sources) -> list[Part]:
    found = [PARTS[name].fit(sources) for name in names]
    return [part for part in found if part is not None]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}
