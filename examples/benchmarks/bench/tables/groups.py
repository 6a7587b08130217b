"""Cold-start users and items apart: which test users belong to which group."""

import numpy as np

from peft_bituning.data import Interactions, LeaveOneOut

from ..plan import ColdStart


def cold_start_groups(data: Interactions, bounds: ColdStart) -> dict[str, np.ndarray]:
    """Tell test users by how much training has seen of them and of their targets.

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
    few_events, few_counts = bounds.user_events, bounds.item_events
    return {
        f"users with up to {few_events} training events": events <= few_events,
        f"users with more than {few_events}": events > few_events,
        "targets never seen in training": of_target == 0,
        f"targets seen 1 to {few_counts} times": (of_target >= 1) & (of_target <= few_counts),
        f"targets seen more than {few_counts} times": of_target > few_counts,
    }
