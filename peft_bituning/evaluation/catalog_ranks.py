"""Ranks of targets among the whole catalog, straight from embeddings: the score matrix [B, I] is never whole."""

from collections.abc import Collection, Sequence
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from ..catalog.item_table import ItemTable
from ..errors import ConfigurationError, InputError
from ..metrics.ranking import check_indices, refuse_nan, seen_cells

MAX_SCORES = 1 << 24  # a float32 counts to so many without an error; 64 MiB
MIN_ROWS = 16  # fewer rows than these multiply the table at less than half the speed of many


@torch.no_grad()
def catalog_ranks(
    users: Tensor,
    table: ItemTable,
    targets: Sequence[int],
    seen: Sequence[Collection[int]],
    max_scores: int = MAX_SCORES,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank each user's target by cosine among all items, ties counted half, seen items kept and left out.

    What `metrics.target_ranks` gives on `table.scores(users)`, `[B]` both, from tiles of it. A tile holds all items of
    as many rows as fit, and a small matrix is one tile; where fewer than `MIN_ROWS` fit, a chunk of items of many rows,
    and the tiles with a target in them are multiplied twice: once for its score, once to count against it.

    Args:
        users: `[B, D]`, any length.
        table: The item table.
        targets: `[B]` catalog indices.
        seen: For each row the catalog indices to leave out (duplicates allowed). A target among them is ranked I.
        max_scores: Scores of one tile; two tiles are in memory.

    Raises:
        ConfigurationError: `max_scores` is not from 1 to 2^24, to which a float32 counts.
        InputError: Lengths do not fit, a target or seen index lies outside the catalog, or a score is NaN.
    """
    if not 1 <= max_scores <= MAX_SCORES:
        raise ConfigurationError(f"max_scores must be from 1 to {MAX_SCORES}, got {max_scores!r}")
    num_rows, num_items = len(users), len(table)
    for name, values in (("targets", targets), ("seen", seen)):
        if len(values) != num_rows:
            raise InputError(f"{name} must have one entry for each of the {num_rows} users, got {len(values)}")
    rows, target_items = np.arange(num_rows), np.array(targets, dtype=np.int64)
    check_indices("targets", target_items, num_items)
    seen_rows, seen_items = seen_cells(seen, num_items)
    if not num_rows:
        return np.empty(0), np.empty(0)

    shape = _tile_shape(num_rows, num_items, max_scores)
    target_cells = _Cells(rows, target_items, shape, num_items, users.device)
    left_out = _Cells(seen_rows, seen_items, shape, num_items, users.device)
    parts = [
        _counts(users[first : first + shape[0]], table, band, shape[1], target_cells, left_out)
        for band, first in enumerate(range(0, num_rows, shape[0]))
    ]
    is_nan, greater, equal, greater_seen, equal_seen = torch.cat(parts, dim=1).cpu().numpy()  # [B] each
    refuse_nan(is_nan)
    unfiltered = 1.0 + greater + 0.5 * equal
    filtered = 1.0 + (greater - greater_seen) + 0.5 * (equal - equal_seen)
    filtered[seen_rows[seen_items == target_items[seen_rows]]] = num_items
    return unfiltered, filtered


class _Cells:
    """Places in the score matrix, sorted by the tile they lie in: a tile's own are a slice, found without a sync."""

    def __init__(
        self, rows: np.ndarray, items: np.ndarray, shape: tuple[int, int], num_items: int, device: torch.device
    ) -> None:
        self.tiles_a_band = -(-num_items // shape[1])
        tiles = rows // shape[0] * self.tiles_a_band + items // shape[1]
        order = np.argsort(tiles, kind="stable")
        self.tiles = tiles[order]
        self.rows = torch.from_numpy(rows[order] % shape[0]).to(device)
        self.items = torch.from_numpy(items[order] % shape[1]).to(device)

    def of(self, band: int, chunk: int) -> tuple[Tensor, Tensor]:
        """Return rows and columns within a tile."""
        tile = band * self.tiles_a_band + chunk
        low, high = np.searchsorted(self.tiles, (tile, tile + 1))
        return self.rows[low:high], self.items[low:high]


def _tile_shape(num_rows: int, num_items: int, max_scores: int) -> tuple[int, int]:
    """Rows and items scored at once."""
    rows_of_all_items = max_scores // num_items
    if rows_of_all_items >= min(num_rows, MIN_ROWS):
        return min(num_rows, rows_of_all_items), num_items
    rows = min(num_rows, isqrt(max_scores))
    chunks = -(-num_items // (max_scores // rows))
    return rows, -(-num_items // chunks)  # even: a narrow last one could be multiplied by another kernel


def _counts(users: Tensor, table: ItemTable, band: int, width: int, targets: _Cells, seen: _Cells) -> Tensor:
    """Count, for each row of a band of tiles, the other items above its target and level with it.

    Of `[5, rows]` int64 the first says whether a score is NaN; then items greater and equal, and how many are seen.
    """
    chunks = range(targets.tiles_a_band)
    target_scores = torch.empty(len(users), 1, device=users.device)
    counts = torch.zeros(5, len(users), dtype=torch.long, device=users.device)
    block = None
    for chunk in chunks:
        rows, items = targets.of(band, chunk)
        if len(rows):
            block = None  # or two would be alive while the next one is computed
            block = _block(users, table, chunk, width)
            target_scores[rows, 0] = block[rows, items]
    for chunk in chunks:
        if block is None or len(chunks) > 1:
            block = None
            block = _block(users, table, chunk, width)
        counts[0] |= block.amax(1).isnan()  # a maximum keeps NaN
        # Nothing compares with NaN: the target is no rival of its own, whatever the product's last bit was before.
        block[targets.of(band, chunk)] = torch.nan
        rows, items = seen.of(band, chunk)
        seen_scores, their_targets = block[rows, items], target_scores[rows, 0]
        counts[3].index_add_(0, rows, (seen_scores > their_targets).long())
        counts[4].index_add_(0, rows, (seen_scores == their_targets).long())
        # Floats, as they sum ten times as fast as booleans on a CPU; exact up to 2^24.
        counts[1] += torch.gt(block, target_scores, out=torch.empty_like(block)).sum(1).long()
        counts[2] += block.eq_(target_scores).sum(1).long()
    return counts


def _block(users: Tensor, table: ItemTable, chunk: int, width: int) -> Tensor:
    return ItemTable(table.embeddings[chunk * width : (chunk + 1) * width]).scores(users)
