"""The choices of users: every feature of every item, or of enough drawn items where the catalog is large.

Shapes: `U` users, `I` catalog items, `K` items that a user chooses among, `S` items that all share, `F` features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...data.collator import pad_histories
from ...data.samples import HistoryAndTarget
from ..histories import Cells, Histories
from .part import Part
from .weights import Choices

MAX_ITEMS = 1 << 14  # a larger catalog is drawn from
MAX_OWN = 1 << 11  # items of a user's own: those that a sparse part speaks of
MAX_VALUES = 1 << 29  # features of all users and items together; more users are drawn from
USERS_AT_ONCE = 64


def draw_choices(
    parts: Sequence[Part],
    samples: Sequence[HistoryAndTarget],
    popularity: Tensor,
    seed: int = 0,
    max_items: int = MAX_ITEMS,
) -> Choices:
    """Compute what the weights are fitted on.

    Up to `max_items` all items are chosen among. Above, a user chooses among the target, the items that a sparse part
    speaks of (at most `MAX_OWN`, drawn), the most popular, and a uniform draw of the others, each of which stands for
    as many as were not drawn: `o = log(others / drawn)`.

    Args:
        parts: the parts.
        samples: validation users.
        popularity: `[I]` counts.
        seed: of the draws.
        max_items: items that all users share at most.

    Returns:
        The choices; the target stands first where items are drawn.
    """
    generator = np.random.default_rng(seed)
    num_items, num_features = len(popularity), sum(len(part.features) for part in parts)
    if num_items <= max_items:
        shared, offsets, width = np.arange(num_items), np.zeros(num_items), num_items
    else:
        popular = popularity.argsort(descending=True, stable=True)[: max_items // 2].numpy()
        others = np.setdiff1d(np.arange(num_items), popular)
        drawn = generator.choice(others, max_items - len(popular), replace=False)
        shared = np.sort(np.concatenate([popular, drawn]))
        offsets = np.where(np.isin(shared, drawn), np.log(len(others) / len(drawn)), 0.0)
        width = len(shared) + 1 + MAX_OWN
    limit = max(1, MAX_VALUES // (width * max(1, num_features)))
    if len(samples) > limit:
        samples = [samples[user] for user in sorted(generator.choice(len(samples), limit, replace=False))]
    features = torch.zeros(len(samples), num_features, width)
    items = None if num_items <= max_items else torch.zeros(len(samples), width, dtype=torch.int32)
    found = Choices(features, torch.zeros(len(samples), width), torch.zeros(len(samples), dtype=torch.long), items)
    for start in range(0, len(samples), USERS_AT_ONCE):
        batch = samples[start : start + USERS_AT_ONCE]
        targets = np.array([sample.target for sample in batch])
        item_indices, mask = pad_histories([sample.history for sample in batch])
        histories = Histories(item_indices, mask, num_items)
        rows = slice(start, start + len(batch))
        if num_items <= max_items:
            found.chosen[rows] = torch.from_numpy(targets)
            _fill(found.features[rows], parts, histories, np.broadcast_to(shared, (len(batch), width)))
            continue
        columns, found.offsets[rows] = _drawn(parts, histories, targets, shared, offsets, generator)
        _fill(found.features[rows], parts, histories, columns)
        if items is not None:
            items[rows] = torch.from_numpy(columns).int()
    return found


def _drawn(
    parts: Sequence[Part],
    histories: Histories,
    targets: np.ndarray,
    shared: np.ndarray,
    offsets: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, Tensor]:
    """Return which items each user chooses among `[B, K]`, ascending but for the target, and their offsets."""
    touched = [part.cells(histories) for part in parts if part.sparse]
    columns = np.zeros((len(histories), len(shared) + 1 + MAX_OWN), dtype=np.int64)
    weights = torch.full(columns.shape, -torch.inf)
    for row, target in enumerate(targets):
        own = np.unique(
            np.concatenate([cells.items[cells.rows == row] for cells in touched] or [np.zeros(0, np.int64)])
        )
        own = own[own != target]
        if len(own) > MAX_OWN:
            own = np.sort(generator.choice(own, MAX_OWN, replace=False))
        others = ~np.isin(shared, own) & (shared != target)
        columns[row, 0], columns[row, 1 : 1 + len(own)] = target, own
        columns[row, 1 + MAX_OWN :] = shared
        weights[row, : 1 + len(own)] = 0.0
        weights[row, 1 + MAX_OWN :] = torch.from_numpy(np.where(others, offsets, -np.inf)).float()
    return columns, weights


def _fill(features: Tensor, parts: Sequence[Part], histories: Histories, columns: np.ndarray) -> None:
    """Write the features `[B, F, K]` of chosen items `[B, K]`."""
    first = 0
    places = torch.from_numpy(np.ascontiguousarray(columns))
    for part in parts:
        middle = first + len(part.dense)
        if part.dense:
            queries = part.queries(histories)  # [dense, B, d]
            if columns.strides[0] == 0:  # the same items for all
                features[:, first:middle] = (queries @ part.item_vectors.T).transpose(0, 1)
            else:
                for row in range(len(histories)):
                    features[row, first:middle] = queries[:, row] @ part.item_vectors[places[row]].T
        if part.sparse:
            _scatter(features[:, middle : middle + len(part.sparse)], part.cells(histories), columns)
        first = middle + len(part.sparse)


def _scatter(features: Tensor, cells: Cells, columns: np.ndarray) -> None:
    """Put the values of cells where their items are among a row's columns."""
    values = torch.from_numpy(cells.values).float()
    if columns.strides[0] == 0:
        features[torch.from_numpy(cells.rows), :, torch.from_numpy(cells.items)] = values
        return
    bounds = np.searchsorted(cells.rows, np.arange(len(columns) + 1))
    for row, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        items = cells.items[low:high]  # ascending
        if not len(items):
            continue
        places = np.searchsorted(items, columns[row]).clip(max=len(items) - 1)
        here = items[places] == columns[row]
        features[row][:, torch.from_numpy(here)] = values[low:high][torch.from_numpy(places[here])].T
