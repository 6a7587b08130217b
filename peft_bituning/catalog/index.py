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
        chunk_size: Queries scored at once, so that `[chunk_size, I]` scores are held at a time.

    Raises:
        InputError: The shape is not `[I, D]`, or a row is not finite (the first such rows are named).
        ConfigurationError: `chunk_size` is below 1.
    """

    def __init__(self, embeddings: Tensor, chunk_size: int = 256) -> None:
        if chunk_size < 1:
            raise ConfigurationError(f"chunk_size must be at least 1, got {chunk_size!r}")
        if embeddings.ndim != 2 or 0 in embeddings.shape:
            raise InputError(f"embeddings must have shape [items, width], got {list(embeddings.shape)}")
        self.embeddings = _normalised("embeddings", embeddings)
        self.chunk_size = chunk_size

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
        columns = self._candidate_columns(candidates)
        scores = torch.full((len(queries), k), float("-inf"), device=device)
        indices = torch.full((len(queries), k), -1, dtype=torch.long, device=device)
        kept = min(k, len(columns))
        for start in range(0, len(queries) if kept else 0, self.chunk_size):
            stop = min(start + self.chunk_size, len(queries))
            chunk = queries[start:stop] @ self.embeddings.T  # [chunk, I]
            if exclude is not None:
                chunk[self._cells(exclude[start:stop])] = float("-inf")
            # the whole catalog is multiplied, so that candidates cannot change a score's last bit
            chunk = chunk[:, columns]
            best, positions = _stable_top_k(chunk, kept)
            scores[start:stop, :kept] = best
            indices[start:stop, :kept] = columns[positions].masked_fill(best == float("-inf"), -1)
        return scores, indices

    def _candidate_columns(self, candidates: Sequence[int] | Tensor | None) -> Tensor:
        device = self.embeddings.device
        if candidates is None:
            return torch.arange(len(self), device=device)
        columns = torch.as_tensor(candidates, dtype=torch.long, device=device).flatten().unique()
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
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above = scores > threshold
    equal = scores == threshold
    # of those that tie at the threshold, the first columns fill the places left
    taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    columns = taken.nonzero()[:, 1].view(len(scores), k)
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)
