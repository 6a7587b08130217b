"""New items: how the score of an item that nobody could have bought stands to those of the others.

Where counts are missing, text and language model have to say all. So some items are treated as new once more, and two
numbers are fitted on the same validation users: `score = new_offset + new_scale * sum of the parts that do not count`.

Shapes: `U` users, `K` items that a user chooses among, `F` features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from .part import Part
from .weights import Choices, fit_weights

OFFSET, SCALE = "new_offset", "new_scale"
SHARE = 0.1
USERS_AT_ONCE = 64


def fit_new_items(
    choices: Choices, parts: Sequence[Part], weights: Mapping[str, float], num_items: int, seed: int = 0
) -> dict[str, float]:
    """Fit offset and scale, with a tenth of the items taken for new.

    Args:
        choices: the users' choices by all features of the parts.
        parts: the parts, in the order of the features.
        weights: the features' weights, which stay.
        num_items: catalog size I.
        seed: of the draw.

    Returns:
        The two, by name; nothing where the parts that do not count say nothing.
    """
    names = [name for part in parts for name in part.features]
    telling = {name for part in parts if not part.counts for name in part.features}
    if not any(weights.get(name) for name in telling if not name.startswith(("seen", "last"))):
        return {}
    everything = torch.tensor([weights.get(name, 0.0) for name in names])
    alone = torch.tensor([weights.get(name, 0.0) if name in telling else 0.0 for name in names])
    drawn = np.random.default_rng(seed).choice(num_items, max(1, round(SHARE * num_items)), replace=False)
    is_new = torch.zeros(num_items, dtype=torch.bool)
    is_new[torch.from_numpy(drawn)] = True
    users, _, width = choices.features.shape
    features, offsets = torch.zeros(users, 2, width), choices.offsets.clone()
    for start in range(0, users, USERS_AT_ONCE):
        rows = slice(start, start + USERS_AT_ONCE)
        new = is_new[torch.arange(num_items) if choices.items is None else choices.items[rows]].expand(
            len(choices.chosen[rows]), width
        )
        scores = torch.einsum("f,bfk->bk", everything, choices.features[rows])
        told = torch.einsum("f,bfk->bk", alone, choices.features[rows])
        offsets[rows] += scores.masked_fill(new, 0.0)
        features[rows, 0], features[rows, 1] = new.float(), told.masked_fill(~new, 0.0)
    found = fit_weights(
        replace(choices, features=features, offsets=offsets), [OFFSET, SCALE], {OFFSET: 0.0, SCALE: 1.0}
    )
    return found.weights if found.weights[SCALE] > 0 else {}
