"""Which training rows make up each update, the same for any number of processes."""

import random
from collections.abc import Sequence

BUCKET_BATCHES = 32


def plan_updates(lengths: Sequence[int], rows_per_update: int, seed: int, epoch: int) -> list[list[int]]:
    """Group the rows of an epoch into updates of similar length, in random order.

    Rows are shuffled, sorted by length within pools of some 32 updates, cut into updates, and the updates
    shuffled: little padding, and still another grouping every epoch.

    Args:
        lengths: tokens of each row.
        rows_per_update: rows an optimizer update, over all processes and accumulation steps.
        seed: seed of the run.
        epoch: number of the epoch over both stages.

    Returns:
        Row numbers, one list an update; one of them may be shorter.
    """
    generator = random.Random(f"updates/{seed}/{epoch}")
    rows = list(range(len(lengths)))
    generator.shuffle(rows)
    pool = rows_per_update * BUCKET_BATCHES
    updates: list[list[int]] = []
    for start in range(0, len(rows), pool):
        bucket = sorted(rows[start : start + pool], key=lambda row: lengths[row])
        updates.extend(bucket[first : first + rows_per_update] for first in range(0, len(bucket), rows_per_update))
    generator.shuffle(updates)
    return updates


def share_of(update: Sequence[int], process: int, num_processes: int, accumulation: int) -> list[list[int]]:
    """Cut one update into the micro-batches of one process.

    Args:
        update: row numbers.
        process: index of the process.
        num_processes: how many there are.
        accumulation: micro-batches an update.

    Returns:
        `accumulation` lists, as even as they can be, some empty where rows are fewer; over all processes each row
        occurs once.
    """
    slots = num_processes * accumulation
    return [list(update[step * num_processes + process :: slots]) for step in range(accumulation)]
