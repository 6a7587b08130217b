"""The part `text`: how like an item's text is to the texts of the history.

Shapes: `B` rows, `I` catalog items, `d` width of the vectors.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...errors import ArtifactError, ConfigurationError
from ..histories import Cells, Histories
from ..neighbors import NeighborLists
from .part import Part, Sources, TextVectors, register_part
from .tfidf import tfidf_neighbors
from .whitening import Whitening

DECAY = 0.7
ALL = ("text", "text_last")
SEEN = ("text_seen", "text_last_seen")
TFIDF = "tf-idf"


@register_part("text")
class TextPart(Part):
    """`text(j, h)`: likeness of j and the whole of h, an item counting `.7^age`; `text_last`: of j and the last item.

    Of vectors t, `cos(sum of .7^age t_i, t_j)` and `cos(t_last, t_j)`; of tf-idf, whose cosines s are kept as lists of
    neighbors, `sum of .7^age s(i, j) / sum of .7^age` and `s(last, j)`. `text_seen` and `text_last_seen` are the same
    where j is in h, else 0: what is bought again need not be like the rest. Needs texts; an item without one has 0.
    """

    @classmethod
    def fit(cls, sources: Sources) -> "TextPart | None":
        """Find neighbors by tf-idf, or whiten the vectors."""
        if sources.text is None:
            return None
        if isinstance(sources.text, TextVectors):
            vectors, num_items = np.asarray(sources.text.vectors), len(sources.items)
            if len(vectors) != num_items:
                raise ConfigurationError(f"text must have {num_items} vectors, one per item, got {len(vectors)}")
            whitening = Whitening.fit(vectors, sources.shrinkage)
            return TextVectorsPart(whitening, torch.from_numpy(whitening(vectors)))
        if sources.text != TFIDF:
            raise ConfigurationError(f"text must be 'tf-idf', vectors [I, d] or None, got {sources.text!r}")
        return TextNeighborsPart(tfidf_neighbors(sources.items, len(sources.items)), len(sources.items))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], sources: Sources) -> "TextPart":
        """Take lists or vectors."""
        num_items = len(sources.items)
        if "fitted" in tensors:
            return TextNeighborsPart(NeighborLists.of(tensors, num_items), int(tensors["fitted"]))
        if not {"mean", "map", "vectors"} <= set(tensors) or len(tensors["vectors"]) != num_items:
            raise ArtifactError(f"the part text must have mean, map and {num_items} vectors; save the folder again")
        return TextVectorsPart(Whitening(tensors["mean"].numpy(), tensors["map"].numpy()), tensors["vectors"].float())


class TextNeighborsPart(TextPart):
    """The part where likeness is kept as lists of neighbors."""

    name = "text"
    sparse = (*ALL, *SEEN)

    def __init__(self, lists: NeighborLists, num_fitted: int) -> None:
        self.lists, self.num_fitted = lists, num_fitted

    def cells(self, histories: Histories) -> Cells:
        """Return the items near to a history, and those of it."""
        weights = DECAY ** histories.ages.astype(np.float64)
        totals = np.bincount(histories.rows, weights, len(histories))
        near = self.lists.scores(histories, weights / totals[histories.rows])
        last = self.lists.scores(histories, (histories.ages == 0).astype(np.float64))
        keys = near.rows * histories.num_items + near.items  # what is near to the last item is near to the history
        values = np.zeros((len(keys), 4))
        values[:, 0] = near.values
        values[np.searchsorted(keys, last.rows * histories.num_items + last.items), 1] = last.values
        is_seen = np.isin(keys, histories.seen.rows * histories.num_items + histories.seen.items)
        values[is_seen, 2:] = values[is_seen, :2]
        return Cells(near.rows, near.items, values)

    def extended(self, sources: Sources, num_known: int) -> "TextNeighborsPart":
        """Find the neighbors of new items, and put these into the lists of the others."""
        new = tfidf_neighbors(sources.items, self.num_fitted, num_known)
        width = max(self.lists.items.shape[1], new.items.shape[1])  # a small catalog's lists are short
        old, new = self.lists.resized(width), new.resized(width)
        whole = NeighborLists(
            np.concatenate([old.items, new.items]), np.concatenate([old.similarities, new.similarities])
        )
        for place, item in enumerate(range(num_known, len(sources.items))):
            is_near = (new.similarities[place] > 0) & (new.items[place] < num_known)
            near = new.items[place][is_near]
            closer = NeighborLists(whole.items[near], whole.similarities[near]).joined(
                np.full((len(near), 1), item, np.int32), new.similarities[place][is_near][:, None]
            )
            whole.items[near], whole.similarities[near] = closer.items, closer.similarities
        return TextNeighborsPart(whole, self.num_fitted)

    def tensors(self) -> dict[str, Tensor]:
        """Return the lists, and how many items weighed the words."""
        return {**self.lists.tensors(), "fitted": torch.tensor(self.num_fitted)}


class TextVectorsPart(TextPart):
    """The part where likeness is the cosine of whitened vectors."""

    name = "text"
    dense = ALL
    sparse = SEEN

    def __init__(self, whitening: Whitening, vectors: Tensor) -> None:
        self.whitening = whitening
        self.item_vectors = vectors

    def queries(self, histories: Histories) -> Tensor:
        """Return the texts of the history, and of its last item, `[2, B, d]` of length 1."""
        rows, items = torch.from_numpy(histories.rows), torch.from_numpy(histories.items)
        texts = self.item_vectors[items]  # [E, d]
        ages = torch.from_numpy(histories.ages.copy())
        queries = torch.zeros(2, len(histories), texts.shape[1])
        queries[0].index_add_(0, rows, texts * (DECAY ** ages.float())[:, None])
        queries[1].index_add_(0, rows[ages == 0], texts[ages == 0])
        return torch.nn.functional.normalize(queries, dim=2)

    def cells(self, histories: Histories) -> Cells:
        """Return the items of the history."""
        seen, queries = histories.seen, self.queries(histories)
        values = (queries[:, torch.from_numpy(seen.rows)] * self.item_vectors[torch.from_numpy(seen.items)]).sum(2)
        return Cells(seen.rows, seen.items, values.T.double().numpy())

    def extended(self, sources: Sources, num_known: int) -> "TextVectorsPart":
        """Whiten the new items' vectors; without them new items have none, and score 0."""
        vectors = torch.zeros(len(sources.items) - num_known, self.item_vectors.shape[1])
        if isinstance(sources.text, TextVectors):
            vectors = torch.from_numpy(self.whitening(np.asarray(sources.text.vectors)))
        return TextVectorsPart(self.whitening, torch.cat([self.item_vectors, vectors]))

    def tensors(self) -> dict[str, Tensor]:
        """Return vectors and whitening."""
        mean, by = torch.from_numpy(self.whitening.mean), torch.from_numpy(self.whitening.map)
        return {"vectors": self.item_vectors, "mean": mean, "map": by}
