"""Vectors of items whose products come close to item-kNN's similarities, for a prefix that reads counts.

Shapes: `I` catalog items.
"""

import numpy as np
import torch

from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import ItemKNN


def knn_item_vectors(counted: ItemKNN, width: int) -> np.ndarray:
    """Give every item a vector, `[I, width]` float32, so that their products come close to the similarities.

    `V = Q sqrt(L)` for the `width` largest eigenvalues L of `(s + s^T) / 2 + 1`, a vector's product with itself
    being 1 as a cosine's is; found by a randomised decomposition, the same every time.

    Raises:
        ConfigurationError: The width is not from 1 to I.
    """
    if not 1 <= width <= counted.num_items:
        raise ConfigurationError(f"width must be from 1 to the number of items {counted.num_items}, got {width!r}")
    rows = np.repeat(np.arange(counted.num_items), counted.neighbors)
    places = torch.from_numpy(np.stack([rows, counted.neighbor_items.ravel()]))
    both = torch.cat([places, places.flip(0), torch.arange(counted.num_items).repeat(2, 1)], dim=1)
    half = torch.from_numpy(counted.similarities.ravel() / 2)
    values = torch.cat([half, half, torch.ones(counted.num_items)])
    size = (counted.num_items, counted.num_items)
    similarities = torch.sparse_coo_tensor(both, values, size, check_invariants=True).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, strength, _ = torch.svd_lowrank(similarities, q=min(width + 10, counted.num_items), niter=8)
    return (left[:, :width] * strength[:width].sqrt()).numpy()
