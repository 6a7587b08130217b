"""Exact nearest items by cosine, without any approximation.

Shapes: `B` queries, `D` width, `I` catalog items, `k` results.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigurationError, InputError


class ExactIndex:
    """A table of item embeddings that answers top-k queries exactly and deterministically.

    Args:
        embeddings: `[I, D]` item embeddings; they are normalised here, a zero row keeps score 0.
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
        if embeddings.ndim != 2 or 0 in embeddings.shape:
            raise InputError(f"embeddings must have shape [items, width], got {list(embeddings.shape)}")
        self.embeddings = _normalised("embeddings", embeddings)
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
        if k < 1:
            raise ConfigurationError(f"k must be at least 1, got {k!r}")
        if queries.ndim != 2 or queries.shape[1] != self.embeddings.shape[1]:
            raise InputError(f"queries must have shape [rows, {self.embeddings.shape[1]}], got {list(queries.shape)}")
        if exclude is not None and len(exclude) != len(queries):
            raise InputError(f"exclude must have one entry for each of the {len(queries)} queries, got {len(exclude)}")
        device = self.embeddings.device
        queries = _normalised("queries", queries.to(device))
        columns = None if candidates is None else self._candidate_columns(candidates)
        scores = torch.full((len(queries), k), float("-inf"), device=device)
        indices = torch.full((len(queries), k), -1, dtype=torch.long, device=device)
        for start in range(0, len(queries), self.chunk_size):
            stop = min(start + self.chunk_size, len(queries))
            excluded = None if exclude is None else self._cells(exclude[start:stop])
            for first in range(0, len(self), self.item_chunk_size):
                block, found = self._score(queries[start:stop], first, excluded, columns)
                if block.shape[1]:
                    best, places = _stable_top_k(block, min(k, block.shape[1]))
                    # what was found before stands first: ties go to the lower index
                    best = torch.cat([scores[start:stop], best], dim=1)
                    places = torch.cat([indices[start:stop], found[places]], dim=1)
                    scores[start:stop], order = (part[:, :k] for part in best.sort(dim=1, descending=True, stable=True))
                    indices[start:stop] = places.gather(1, order)
        return scores, indices.masked_fill_(scores == float("-inf"), -1)

    def _score(
        self, queries: Tensor, first: int, excluded: tuple[Tensor, Tensor] | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the scores [B, <= item_chunk_size] of a chunk of items from `first` on, and their indices."""
        items = self.embeddings[first : first + self.item_chunk_size]
        block = queries @ items.T
        if excluded is not None:
            rows, cells = excluded
            here = (cells >= first) & (cells < first + len(items))
            block[rows[here], cells[here] - first] = float("-inf")
        if columns is None:
            return block, torch.arange(first, first + len(items), device=block.device)
        # the whole chunk is multiplied, so that candidates cannot change a score's last bit
        here = columns[(columns >= first) & (columns < first + len(items))]
        return block[:, here - first], here

    def _candidate_columns(self, candidates: Sequence[int] | Tensor) -> Tensor:
        columns = torch.as_tensor(candidates, dtype=torch.long, device=self.embeddings.device).flatten().unique()
        self._check_range("candidates", columns)
        return columns

    def _cells(self, exclude: Sequence[Collection[int]]) -> tuple[Tensor, Tensor]:
        device = self.embeddings.device
        rows = torch.repeat_interleave(torch.tensor([len(row) for row in exclude], dtype=torch.long))
        columns = torch.tensor([item for row in exclude for item in row], dtype=torch.long)
        self._check_range("exclude", columns)
        return rows.to(device), columns.to(device)

    def _check_range(self, name: str, columns: Tensor) -> None:
        outside = columns[(columns < 0) | (columns >= len(self))]
        if len(outside):
            raise InputError(f"{name} must be catalog indices from 0 to {len(self) - 1}, got {outside[:5].tolist()}")


def _normalised(name: str, vectors: Tensor) -> Tensor:
    vectors = vectors.detach().float()
    bad = (~vectors.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        raise InputError(f"{name} must be finite, got NaN or infinity in rows {bad[:5].tolist()}")
    return functional.normalize(vectors, dim=1)


def _stable_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k of each row, ties to the lower column; `torch.topk` promises no order among equals."""
    best, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
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
