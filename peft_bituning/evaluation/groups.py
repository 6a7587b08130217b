"""Groups of test users: where counting knows little."""

from collections.abc import Sequence

import numpy as np

from ..data.samples import LeaveOneOut, Sample

RARE = 5
SHORT = 3


def user_groups(split: LeaveOneOut, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Return masks `[U]` of the test users by what is known of them and of their targets.

    A target counts by its events in training and validation; held out are the items that the split took out of both.
    """
    bought: dict[int, int] = {}
    for sequence in split.known_sequences:
        for item in sequence:
            bought[item] = bought.get(item, 0) + 1
    counts = np.array([bought.get(sample.target, 0) for sample in samples], dtype=np.int64)
    return {
        "items held out": np.array([sample.target in split.held_out_items for sample in samples], dtype=bool),
        "items never bought": counts == 0,
        f"items bought 1 to {RARE} times": (counts > 0) & (counts <= RARE),
        f"users with up to {SHORT} events": np.array([len(sample.history) <= SHORT for sample in samples], dtype=bool),
    }
