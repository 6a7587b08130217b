"""The k best items of a hybrid, exactly: one search over the dense parts, and the few cells that sparse parts touch.

Shapes: `B` rows, `I` catalog items, `d` width of the dense vectors.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..recommenders.histories import Histories
from ..recommenders.hybrid import Hybrid
from .index import ExactIndex, ItemIndex, TopK


class HybridIndex:
    """Answers top-k queries of a hybrid without a matrix `[B, I]`.

    The dense parts are one vector per item, v. An index finds greatest cosines: a further coordinate
    `sqrt(m^2 - ||v||^2)`, m the greatest length, makes all vectors as long as m, and the query's is 0, so that cosine
    and product give the same order. Items that a sparse part touches are left out of that search and scored apart.

    Args:
        hybrid: what scores.
        make_index: makes an index of vectors `[I, d + 1]` of length 1, as `ExactIndex` and `FaissIndex` do.
    """

    def __init__(self, hybrid: Hybrid, make_index: Callable[[Tensor], ItemIndex] = ExactIndex) -> None:
        self.hybrid = hybrid
        vectors = hybrid.item_vectors
        lengths = vectors.double().norm(dim=1)
        self.length = max(float(lengths.max()), 1e-12)
        rest = (self.length**2 - lengths**2).clamp(min=0).sqrt()
        self.index = make_index(torch.cat([vectors, rest[:, None].float()], dim=1) / self.length)

    @torch.no_grad()
    def search(
        self,
        histories: Histories,
        k: int,
        exclude: Sequence[Collection[int]] | None = None,
        candidates: Sequence[int] | None = None,
    ) -> TopK:
        """Find the k best items of each row; ties go to the lower catalog index.

        Args:
            histories: B histories.
            k: number of results.
            exclude: for each row the catalog indices to leave out.
            candidates: only these catalog indices are searched; None is the whole catalog.

        Returns:
            Scores float32 and catalog indices int64, `[B, k]` both; -inf and -1 where fewer than k are left.

        Raises:
            InputError: see `ItemIndex.search`, as for all else it raises.
        """
        queries, cells = self.hybrid.queries(histories), self.hybrid.cells(histories)
        left_out: Sequence[Collection[int]] = [()] * len(histories) if exclude is None else exclude
        if len(left_out) != len(histories):
            raise InputError(
                f"exclude must have one entry for each of the {len(histories)} queries, got {len(left_out)}"
            )
        bounds = np.searchsorted(cells.rows, np.arange(len(histories) + 1))
        touched = [slice(*bounds[row : row + 2]) for row in range(len(histories))]
        apart = [{*row, *cells.items[here].tolist()} for row, here in zip(left_out, touched, strict=True)]
        padded = torch.nn.functional.pad(queries, (0, 1))
        _, found = self.index.search(padded, k, exclude=apart, candidates=candidates)
        scores = torch.full((len(histories), k), -torch.inf)
        items = torch.full((len(histories), k), -1)
        allowed = None if candidates is None else np.asarray(candidates, dtype=np.int64)
        for row, here in enumerate(touched):
            own = ~np.isin(cells.items[here], list(left_out[row]))
            if allowed is not None:
                own &= np.isin(cells.items[here], allowed)
            dense = found[row][found[row] >= 0].cpu().numpy()
            places = np.concatenate([dense, cells.items[here][own]])
            values = (self._vectors(places) @ queries[row]).numpy()
            values[len(dense) :] += cells.values[here][own].astype(np.float32)
            best = np.lexsort((places, -values))[:k]
            scores[row, : len(best)] = torch.from_numpy(values[best])
            items[row, : len(best)] = torch.from_numpy(places[best])
        return scores, items

    def _vectors(self, items: np.ndarray) -> Tensor:
        return self.index.embeddings[torch.from_numpy(items)][:, :-1].float().cpu() * self.length
