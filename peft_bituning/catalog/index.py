"""Exact nearest items by cosine, without any approximation.

Shapes: `B` queries, `D` width, `I` catalog items, `k` results.
"""

from collections.abc import Collection, Sequence
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigurationError, InputError
from .item_table import chunks


class ItemIndex(Protocol):
    """What answers top-k queries over a catalog."""

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude: Sequence[Collection[int]] | None = None,
        candidates: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `ExactIndex.search`."""


class ExactIndex:
    """A table of item embeddings that answers top-k queries exactly and deterministically.

    Args:
        embeddings: `[I, D]` item embeddings. Rows of length 1, an item table's, are used where they are, mapped files
            too, and other float types are brought to float32 a chunk at a time; else a normalised copy is made, in
            which a zero row keeps score 0.
        chunk_size: Queries scored at once.
        item_chunk_size: Items scored at once: `[chunk_size, item_chunk_size]` scores are held at a time, never
            `[chunk_size, I]`.

    Raises:
        InputError: The shape is not `[I, D]`, or a row is not finite (the first such rows are named).
        ConfigurationError: A chunk size is below 1.
    """

    def __init__(self, embeddings: Tensor, chunk_size: int = 256, item_chunk_size: int = 16_384) -> None:
        for name, size in (("chunk_size", chunk_size), ("item_chunk_size", item_chunk_size)):
            if size < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {size!r}")
        check_embeddings(embeddings)
        as_they_are = all(_is_unit(rows) for rows in chunks(embeddings))
        self.embeddings = embeddings.detach() if as_they_are else normalised("embeddings", embeddings)
        self.chunk_size = chunk_size
        self.item_chunk_size = item_chunk_size

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
    ) -> tuple[Tensor, Tensor]:
        """Find the k items of greatest cosine for each query; ties go to the lower catalog index.

        Args:
            queries: `[B, D]`.
            k: Number of results.
            exclude: For each query the catalog indices to leave out.
            candidates: Only these catalog indices are searched, for all queries; `None` is the whole catalog.

        Returns:
            Scores `[B, k]` (float32, descending) and catalog indices `[B, k]` (int64). Where fewer than k items are
            left, the rest holds score -inf and index -1.

        Raises:
            InputError: Shapes do not fit, an index lies outside the catalog, or a query is not finite.
            ConfigurationError: `k` is below 1.
        """
        queries = checked_queries(self.embeddings, queries, k, exclude)
        columns = None if candidates is None else checked_candidates(self.embeddings, candidates)
        if len(queries) <= self.chunk_size:
            return self._search(queries, k, exclude, columns)
        scores = queries.new_empty(len(queries), k)
        indices = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
        for start in range(0, len(queries), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            left_out = None if exclude is None else exclude[rows]
            scores[rows], indices[rows] = self._search(queries[rows], k, left_out, columns)
        return scores, indices

    def _search(
        self, queries: Tensor, k: int, exclude: Sequence[Collection[int]] | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Search for a chunk of queries, in one chunk of items after the other."""
        excluded = None if exclude is None else self._cells(exclude)
        found: tuple[Tensor, Tensor] | None = None
        for first in range(0, len(self), self.item_chunk_size):
            block, indices = self._score(queries, first, excluded, columns)
            if not block.shape[1]:
                continue
            scores, places = stable_top_k(block, min(k, block.shape[1]))
            if indices is not None:
                places = indices[places]
            elif first:
                places = places + first
            if found is not None:
                # what was found before stands first: ties go to the lower index
                scores, order = torch.cat([found[0], scores], dim=1).sort(dim=1, descending=True, stable=True)
                scores, places = scores[:, :k], torch.cat([found[1], places], dim=1).gather(1, order[:, :k])
            found = scores, places
        if found is None:
            found = (
                queries.new_empty(len(queries), 0),
                torch.empty(len(queries), 0, dtype=torch.long, device=queries.device),
            )
        return padded(*found, k)

    def _score(
        self, queries: Tensor, first: int, excluded: tuple[Tensor, Tensor] | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the scores [B, <= item_chunk_size] of a chunk of items from `first` on, and whose they are.

        The latter is None where they are the whole chunk's.
        """
        items = self.embeddings[first : first + self.item_chunk_size]
        block = _cosines(queries, items if items.dtype == torch.float32 else normalised("embeddings", items, first))
        if excluded is not None:
            rows, cells = excluded
            if len(items) < len(self):
                here = (cells >= first) & (cells < first + len(items))
                rows, cells = rows[here], cells[here] - first
            block[rows, cells] = float("-inf")
        if columns is None:
            return block, None
        # the whole chunk is multiplied, so that candidates cannot change a score's last bit
        here = columns[(columns >= first) & (columns < first + len(items))]
        return block[:, here - first], here

    def _cells(self, exclude: Sequence[Collection[int]]) -> tuple[Tensor, Tensor]:
        rows = [row for row, items in enumerate(exclude) for _ in items]
        columns = [item for items in exclude for item in items]
        cells = torch.tensor([rows, columns], dtype=torch.long).to(self.embeddings.device)
        return cells[0], cells[1]


def _cosines(queries: Tensor, items: Tensor) -> Tensor:
    """Multiply queries [B, D] with items [I, D], all float32 of length 1, to scores [B, I]."""
    if len(queries) == 1 and queries.device.type == "cpu":  # MKL in PyTorch reads memory at half the speed on AMD
        return torch.from_numpy(queries.numpy() @ items.numpy().T)
    return queries @ items.T


def _is_unit(rows: Tensor) -> bool:
    """Whether all rows are of length 1, to the rounding of their type."""
    tolerance = max(1e-6, torch.finfo(rows.dtype).eps) if rows.dtype.is_floating_point else -1.0
    return bool(((torch.linalg.vector_norm(rows.detach().float(), dim=1) - 1).abs() <= tolerance).all())


def check_embeddings(embeddings: Tensor) -> None:
    """Refuse embeddings that are no table.

    Args:
        embeddings: `[I, D]`.

    Raises:
        InputError: The shape is another, or empty.
    """
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise InputError(f"embeddings must have shape [items, width], got {list(embeddings.shape)}")


def checked_queries(embeddings: Tensor, queries: Tensor, k: int, exclude: Sequence[Collection[int]] | None) -> Tensor:
    """Refuse a search that an index cannot answer.

    Args:
        embeddings: `[I, D]`, the index's.
        queries: `[B, D]`.
        k: Number of results.
        exclude: For each query the catalog indices to leave out.

    Returns:
        The queries `[B, D]` float32, each of length 1, on the device of the embeddings.

    Raises:
        InputError: Shapes do not fit, an index lies outside the catalog, or a query is not finite.
        ConfigurationError: `k` is below 1.
    """
    num_items, width = embeddings.shape
    if k < 1:
        raise ConfigurationError(f"k must be at least 1, got {k!r}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise InputError(f"queries must have shape [rows, {width}], got {list(queries.shape)}")
    if exclude is not None:
        if len(exclude) != len(queries):
            raise InputError(f"exclude must have one entry for each of the {len(queries)} queries, got {len(exclude)}")
        outside = [item for row in exclude for item in row if not 0 <= item < num_items]
        if outside:
            raise InputError(f"exclude must be catalog indices from 0 to {num_items - 1}, got {outside[:5]}")
    return normalised("queries", queries.to(embeddings.device))


def checked_candidates(embeddings: Tensor, candidates: Sequence[int] | Tensor) -> Tensor:
    """Sort candidates, each once.

    Args:
        embeddings: `[I, D]`, the index's.
        candidates: Catalog indices.

    Returns:
        The same, ascending, on the device of the embeddings.

    Raises:
        InputError: One lies outside the catalog.
    """
    columns = torch.as_tensor(candidates, dtype=torch.long, device=embeddings.device).flatten().unique()
    outside = columns[(columns < 0) | (columns >= len(embeddings))]
    if len(outside):
        raise InputError(
            f"candidates must be catalog indices from 0 to {len(embeddings) - 1}, got {outside[:5].tolist()}"
        )
    return columns


def normalised(name: str, vectors: Tensor, first: int = 0) -> Tensor:
    """Scale vectors to length 1; zeros stay zeros.

    Args:
        name: What they are, for the message.
        vectors: `[rows, D]`, any float dtype.
        first: Number of the first row, for the message.

    Returns:
        `[rows, D]` float32.

    Raises:
        InputError: A row is not finite (the first such rows are named).
    """
    vectors = vectors.detach().float()
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    if not isfinite(lengths.sum()):  # one number says that all are finite; this one may also be too great
        bad = (~vectors.isfinite()).any(1).nonzero()[:5, 0] + first
        if len(bad):
            raise InputError(f"{name} must be finite, got NaN or infinity in rows {bad.tolist()}")
    return vectors / lengths.clamp_min(1e-12)


def padded(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Bring results to k columns, and say -1 where nothing was found.

    Args:
        scores: `[B, <= k]`, -inf for what is left out.
        indices: Their catalog indices.
        k: Number of results.

    Returns:
        Scores and indices `[B, k]`.
    """
    if scores.shape[1] < k:
        missing = (len(scores), k - scores.shape[1])
        scores = torch.cat([scores, scores.new_full(missing, float("-inf"))], dim=1)
        indices = torch.cat([indices, indices.new_full(missing, -1)], dim=1)
    return scores, indices.masked_fill(scores == float("-inf"), -1)


def stable_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the top k of each row, ties to the lower column; `torch.topk` promises no order among equals.

    Args:
        scores: `[B, columns]` without NaN.
        k: How many, not more than there are columns.

    Returns:
        Scores `[B, k]`, descending, and their columns.
    """
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
