"""Cold-start users and items apart: which test users belong to which group."""

from typing import Any

import numpy as np

from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import ConfigurationError

USER_EVENTS, ITEM_EVENTS = "user_events", "item_events"


def check_bounds(bounds: Any) -> None:
    """Refuse what is not `{user_events: n, item_events: m}` with counts.

    Args:
        bounds: what a configuration says under `cold_start`.

    Raises:
        ConfigurationError: another name, or no count.
    """
    if not isinstance(bounds, dict) or set(bounds) != {USER_EVENTS, ITEM_EVENTS}:
        raise ConfigurationError(f"cold_start must be {{{USER_EVENTS}: n, {ITEM_EVENTS}: m}}, got {bounds!r}")
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigurationError(f"{name} of cold_start must be an integer >= 0, got {value!r}")


def cold_start_groups(data: Interactions, bounds: dict[str, int]) -> dict[str, np.ndarray]:
    """Tell test users by how much training has seen of them and of their targets.

    Args:
        data: the histories.
        bounds: `user_events`: a user with at most so many training events is cold; `item_events`: an item that occurs
            in training at most so often is cold.

    Returns:
        By the group's name a mask over the test users, in the split's order.
    """
    split = LeaveOneOut(data.histories)
    samples = split.samples("test")
    sequences = split.train_sequences
    events = np.array([len(sequences[sample.user]) for sample in samples], dtype=np.int64)
    trained = np.array([item for sequence in sequences for item in sequence], dtype=np.int64)
    counts = np.bincount(trained, minlength=len(data.items))
    of_target = counts[np.array([sample.target for sample in samples], dtype=np.int64)]
    few_events, few_counts = bounds[USER_EVENTS], bounds[ITEM_EVENTS]
    return {
        f"users with up to {few_events} training events": events <= few_events,
        f"users with more than {few_events}": events > few_events,
        "targets never seen in training": of_target == 0,
        f"targets seen 1 to {few_counts} times": (of_target >= 1) & (of_target <= few_counts),
        f"targets seen more than {few_counts} times": of_target > few_counts,
    }
