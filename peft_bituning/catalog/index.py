"""Nearest items by cosine, for B queries the k best of I items: what all indexes share, and the exact one."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import reduce
from math import isfinite

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError, InputError
from ..metrics.ranking import check_indices
from .item_table import chunks

TopK = tuple[Tensor, Tensor]  # scores and catalog indices


class ItemIndex(ABC):
    """A table of item embeddings `[I, D]`, kept as they are, that answers top-k queries over the catalog.

    Raises:
        InputError: The shape is not `[I, D]`.
    """

    chunk_size: int = 256  # queries scored at once

    def __init__(self, embeddings: Tensor) -> None:
        if embeddings.ndim != 2 or 0 in embeddings.shape:
            raise InputError(f"embeddings must have shape [items, width], got {list(embeddings.shape)}")
        self.embeddings = embeddings.detach()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.embeddings)

    @torch.no_grad()
    def search(
        self,
        queries: Tensor,
        k: int,
        exclude: Sequence[Collection[int]] | None = None,
        candidates: Sequence[int] | Tensor | None = None,
    ) -> TopK:
        """Find the k items of greatest cosine for each query; ties go to the lower catalog index.

        Args:
            queries: `[B, D]`.
            k: Number of results.
            exclude: For each query the catalog indices to leave out.
            candidates: Only these catalog indices are searched, for all queries; `None` is the whole catalog.

        Returns:
            Scores (float32, descending) and catalog indices (int64), `[B, k]` both; where fewer than k items are left,
            the rest holds score -inf and index -1.

        Raises:
            InputError: Shapes do not fit, an index lies outside the catalog, or a query is not finite.
            ConfigurationError: `k` is below 1.
        """
        num_items, width = self.embeddings.shape
        if k < 1:
            raise ConfigurationError(f"k must be at least 1, got {k!r}")
        if queries.ndim != 2 or queries.shape[1] != width:
            raise InputError(f"queries must have shape [rows, {width}], got {list(queries.shape)}")
        exclude = [()] * len(queries) if exclude is None else exclude
        if len(exclude) != len(queries):
            raise InputError(f"exclude must have one entry for each of the {len(queries)} queries, got {len(exclude)}")
        check_indices("exclude", np.array([item for row in exclude for item in row], dtype=np.int64), num_items)
        items = None
        if candidates is not None:
            items = torch.as_tensor(candidates, dtype=torch.long, device=self.embeddings.device).flatten().unique()
            check_indices("candidates", items.cpu().numpy(), num_items)
        return self._search(normalised("queries", queries.to(self.embeddings.device)), k, exclude, items)

    @abstractmethod
    def _blocks(self, queries: Tensor, items: Tensor | None) -> Iterator[TopK]:
        """Yield scores [B, n] of n items after the other, and their catalog indices [n]."""

    def _search(self, queries: Tensor, k: int, exclude: Sequence[Collection[int]], items: Tensor | None) -> TopK:
        """Search exactly for queries of length 1 among some items, ascending, or among all."""
        found = []
        for start in range(0, max(1, len(queries)), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            cells = [(row, int(item)) for row, left_out in enumerate(exclude[rows]) for item in left_out]
            left_out = torch.tensor(cells, dtype=torch.long).view(-1, 2).to(queries.device)
            blocks = self._blocks(queries[rows], items)
            found.append(reduce(_merged, (_best_of_block(*block, k, left_out) for block in blocks)))
        return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


class ExactIndex(ItemIndex):
    """A table of item embeddings that answers top-k queries exactly and deterministically.

    Args:
        embeddings: `[I, D]` item embeddings. Rows of length 1, an item table's, are used where they are, mapped files
            too, and other float types are brought to float32 a chunk at a time; else a normalised copy is made, in
            which a zero row keeps score 0.
        chunk_size: Queries scored at once.
        item_chunk_size: Items scored at once, so that `[chunk_size, item_chunk_size]` scores are held.

    Raises:
        InputError: The shape is not `[I, D]`, or a row is not finite (the first such rows are named).
        ConfigurationError: A chunk size is below 1.
    """

    def __init__(self, embeddings: Tensor, chunk_size: int = 256, item_chunk_size: int = 16_384) -> None:
        for name, size in (("chunk_size", chunk_size), ("item_chunk_size", item_chunk_size)):
            if size < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {size!r}")
        super().__init__(embeddings)
        if not all(_is_unit(rows) for rows in chunks(self.embeddings)):
            self.embeddings = normalised("embeddings", self.embeddings)
        self.chunk_size = chunk_size
        self.item_chunk_size = item_chunk_size

    def _blocks(self, queries: Tensor, items: Tensor | None) -> Iterator[TopK]:
        for first in range(0, len(self), self.item_chunk_size):
            yield self._score(queries, first, items)

    def _score(self, queries: Tensor, first: int, items: Tensor | None) -> TopK:
        """Return the scores [B, <= item_chunk_size] of a chunk of items from `first` on, and whose they are."""
        rows = self.embeddings[first : first + self.item_chunk_size]
        block = cosines(queries, rows if rows.dtype == torch.float32 else normalised("embeddings", rows, first))
        if items is None:
            return block, torch.arange(first, first + len(rows), device=rows.device)
        # the whole chunk is multiplied, so that candidates cannot change a score's last bit
        here = items[(items >= first) & (items < first + len(rows))]
        return block[:, here - first], here


def cosines(queries: Tensor, items: Tensor) -> Tensor:
    """Multiply queries `[B, D]` with items `[n, D]`, all float32 of length 1, to scores `[B, n]`."""
    if len(queries) == 1 and queries.device.type == "cpu":  # MKL in PyTorch reads memory at half the speed on AMD
        return torch.from_numpy(queries.numpy() @ items.numpy().T)
    return queries @ items.T


def normalised(name: str, vectors: Tensor, first: int = 0) -> Tensor:
    """Scale vectors `[rows, D]` to length 1, in float32; zeros stay zeros.

    One that is not finite is an `InputError` of `name`, in which `first` is the number of the first row.
    """
    vectors = vectors.detach().float()
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    if not isfinite(lengths.sum()):  # one number says that all are finite; this one may also be too great
        bad = (~vectors.isfinite()).any(1).nonzero()[:5, 0] + first
        if len(bad):
            raise InputError(f"{name} must be finite, got NaN or infinity in rows {bad.tolist()}")
    return vectors / lengths.clamp_min(1e-12)


def best_of(scores: Tensor, items: Tensor, k: int) -> TopK:
    """Keep the k best scores `[B, k]` of each row and their catalog indices, ties to the first column.

    Scores `[B, n]` are without NaN, -inf for what is left out, of items `[n]` or `[B, n]`. Where fewer than k are left,
    the rest holds score -inf and index -1.
    """
    best, columns = _stable_top_k(scores, min(k, scores.shape[1]))
    indices = items[columns] if items.ndim == 1 else items.gather(1, columns)
    if best.shape[1] < k:
        missing = (0, k - best.shape[1])
        best, indices = F.pad(best, missing, value=float("-inf")), F.pad(indices, missing)
    return best, indices.masked_fill(best == float("-inf"), -1)


def _best_of_block(scores: Tensor, items: Tensor, k: int, left_out: Tensor) -> TopK:
    """Keep the k best of a block's scores [B, n], whose items [n] ascend, without cells [.., 2] of row and item."""
    if len(items) and len(left_out):
        rows, excluded = left_out.T
        places = torch.searchsorted(items, excluded.contiguous()).clamp_(max=len(items) - 1)
        here = items[places] == excluded
        scores[rows[here], places[here]] = float("-inf")
    return best_of(scores, items, k)


def _merged(found: TopK, more: TopK) -> TopK:
    """Merge the best of two blocks; what was found before stands first, as ties go to the lower index."""
    scores, indices = (torch.cat(pair, dim=1) for pair in zip(found, more, strict=True))
    return best_of(scores, indices, found[0].shape[1])


def _stable_top_k(scores: Tensor, k: int) -> TopK:
    """Return the k best scores of each row and their columns; `torch.topk` promises no order among equals."""
    best, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if not bool((best[:, 1:] == best[:, :-1]).any()):
        return best[:, :k], columns[:, :k]  # there is but one order
    if best.shape[1] > k:
        tied = best[:, k - 1] == best[:, k]  # then topk may have taken the wrong ones
        best, columns = best[:, :k].contiguous(), columns[:, :k].contiguous()
        if bool(tied.any()):
            columns[tied] = _first_columns(scores[tied], best[tied, -1:], k)
    columns = columns.sort(dim=1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)


def _first_columns(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Columns of the k best [B, k]: those above the k-th best score, and the first of those that equal it."""
    above, equal = scores > threshold, scores == threshold
    taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return taken.nonzero()[:, 1].view(len(scores), k)


def _is_unit(rows: Tensor) -> bool:
    """Whether all rows are of length 1, to the rounding of their type."""
    tolerance = max(1e-6, torch.finfo(rows.dtype).eps) if rows.dtype.is_floating_point else -1.0
    return bool(((torch.linalg.vector_norm(rows.detach().float(), dim=1) - 1).abs() <= tolerance).all())
