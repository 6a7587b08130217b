"""Ranks of targets among the whole catalog of I items, and the metrics over U users made of them."""

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from ..errors import InputError

ArrayLike: TypeAlias = torch.Tensor | np.ndarray | Sequence[Any]


def target_ranks(
    scores: ArrayLike,
    targets: ArrayLike,
    seen: Sequence[Collection[int]] | None = None,
) -> np.ndarray:
    """Rank each row's target among all items, `[B]` float64 from 1 to `I`, best first, ties counted half.

    `rank = 1 + #{others with a greater score} + 0.5 * #{others with the same score}`

    Args:
        scores: `[B, I]` real numbers, numpy or torch; infinities are allowed, NaN is not.
        targets: `[B]` catalog indices.
        seen: For each row the catalog indices to leave out (duplicates allowed). A target among them is ranked I.

    Raises:
        InputError: Shapes do not fit, a target or seen index lies outside the catalog, or a score is NaN.
    """
    score_array = _to_numpy(scores)
    target_array = _to_numpy(targets)
    if score_array.ndim != 2 or not score_array.size and score_array.shape[1] == 0:
        raise InputError(f"scores must have shape [rows, items], got {list(score_array.shape)}")
    num_rows, num_items = score_array.shape
    if target_array.shape != (num_rows,):
        raise InputError(
            f"targets must have shape [{num_rows}], one catalog index for each row of scores, "
            f"got {list(target_array.shape)}"
        )
    if num_rows and target_array.dtype.kind not in "iu":
        raise InputError(f"targets must be integers (catalog indices), got {target_array.dtype}")
    target_array = target_array.astype(np.int64)
    check_indices("targets", target_array, num_items)
    refuse_nan(np.isnan(score_array).any(axis=1))
    rows = np.arange(num_rows)
    target_scores = score_array[rows, target_array][:, None]  # [B, 1]
    greater = (score_array > target_scores).sum(axis=1, dtype=np.int64)
    equal = (score_array == target_scores).sum(axis=1, dtype=np.int64)
    seen = [()] * num_rows if seen is None else seen
    if len(seen) != num_rows:
        raise InputError(f"seen must have one entry for each of the {num_rows} rows of scores, got {len(seen)}")
    seen_rows, seen_columns = seen_cells(seen, num_items)
    seen_scores = score_array[seen_rows, seen_columns]
    seen_targets = target_scores[seen_rows, 0]
    greater -= np.bincount(seen_rows[seen_scores > seen_targets], minlength=num_rows)
    equal -= np.bincount(seen_rows[seen_scores == seen_targets], minlength=num_rows)
    ranks = 1.0 + greater + 0.5 * (equal - 1)
    ranks[seen_rows[seen_columns == target_array[seen_rows]]] = num_items
    return ranks


def ranking_metrics(ranks: ArrayLike, k: int = 10) -> dict[str, float]:
    """Average Recall@k, NDCG@k and MRR over users with one target each.

    `recall = [rank <= k]`, `ndcg = [rank <= k] / log2(rank + 1)`, `mrr = 1 / rank` (over the full list); half ranks
    of ties enter as they are.

    Args:
        ranks: `[U]` ranks from 1, as `target_ranks` returns them.
        k: Length of the list that counts for recall and NDCG.

    Returns:
        `{"recall@<k>": .., "ndcg@<k>": .., "mrr": ..}`.

    Raises:
        InputError: `ranks` is empty, not one-dimensional, or holds a value below 1 or NaN; `k` is below 1.
    """
    return {name: float(values.mean()) for name, values in user_gains(ranks, k).items()}


def standard_errors(ranks: ArrayLike, k: int = 10) -> dict[str, float]:
    """Return the standard errors over users of what `ranking_metrics` averages: `{"recall@<k>_se": .., ..}`.

    `se = sd / sqrt(U)`, with the population's standard deviation, so that one user gives 0.
    """
    return {f"{name}_se": float(values.std() / np.sqrt(values.size)) for name, values in user_gains(ranks, k).items()}


def seen_cells(seen: Sequence[Collection[int]], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and catalog indices of what is left out, each item of a row once; refuse what is outside of I."""
    rows = [np.unique(np.array(list(row), dtype=np.int64)) for row in seen]
    items = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    check_indices("seen", items, num_items)
    return np.repeat(np.arange(len(rows)), [len(row) for row in rows]), items


def refuse_nan(is_nan: np.ndarray) -> None:
    """Refuse scores of which rows `[B]` hold NaN."""
    rows = np.flatnonzero(is_nan)
    if rows.size:
        raise InputError(
            f"scores must not be NaN, got NaN in {rows.size} of {len(is_nan)} rows, first in rows "
            f"{rows[:5].tolist()}; check the embeddings they come from"
        )


def check_indices(name: str, indices: np.ndarray, num_items: int) -> None:
    """Refuse integers, called `name` in the message, that lie outside of a catalog of I items."""
    outside = indices[(indices < 0) | (indices >= num_items)]
    if outside.size:
        raise InputError(
            f"{name} must be catalog indices from 0 to {num_items - 1}, got {outside[:5].tolist()}"
            f"{' and more' if outside.size > 5 else ''}"
        )


def user_gains(ranks: ArrayLike, k: int = 10) -> dict[str, np.ndarray]:
    """Return each user's share in what `ranking_metrics` averages, `[U]` float64 by the metrics' names."""
    rank_array = _to_numpy(ranks).astype(np.float64)
    if rank_array.ndim != 1 or rank_array.size == 0:
        raise InputError(f"ranks must have shape [users] with at least one user, got {list(rank_array.shape)}")
    if not (rank_array >= 1).all():
        bad = np.flatnonzero(~(rank_array >= 1))
        raise InputError(f"ranks must be numbers from 1, got {rank_array[bad[0]]} at position {bad[0]}")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    hits = rank_array <= k
    return {
        f"recall@{k}": hits.astype(np.float64),
        f"ndcg@{k}": hits / np.log2(rank_array + 1.0),
        "mrr": 1.0 / rank_array,
    }


def _to_numpy(values: ArrayLike) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"rows of an array must have equal lengths: {error}") from error
