"""The plan of updates: which training rows make up each of them, the same for any number of processes."""

import random
from collections.abc import Mapping, Sequence

BUCKET_BATCHES = 128  # updates that are sorted together; enough that padding stays below 5 % of real histories
LOOK_AHEAD = 32  # runs


def plan_updates(
    lengths: Sequence[int], rows_per_update: int, seed: int, epoch: int, users: Sequence[int] | None = None
) -> list[list[int]]:
    """Group the rows of an epoch into updates of similar length, in random order.

    Rows are shuffled, sorted by length within pools of 128 updates, cut into updates, and the updates shuffled:
    little padding, and still another grouping every epoch. With `users`, what is shuffled and sorted are runs of a
    user's rows, the shortest first, so that an update holds whole runs as far as they fit.

    Args:
        lengths: tokens of each row.
        rows_per_update: over all processes and accumulation steps.
        seed: of the run.
        epoch: its number over both stages.
        users: the user of each row, to keep a user's rows together; None does not.

    Returns:
        Row numbers, one list per update; one of them may be shorter.
    """
    generator = random.Random(f"updates/{seed}/{epoch}")
    runs = [[row] for row in range(len(lengths))] if users is None else _runs(lengths, users, rows_per_update)
    generator.shuffle(runs)
    waiting = runs[::-1]
    updates: list[list[int]] = []
    while waiting:
        bucket: list[list[int]] = []
        room = rows_per_update * BUCKET_BATCHES
        while waiting and room:
            run = waiting.pop()
            bucket.append(run[:room])
            if run[room:]:
                waiting.append(run[room:])
            room -= len(bucket[-1])
        bucket.sort(key=lambda run: lengths[run[-1]])
        updates.extend(_fill(bucket, rows_per_update))
    generator.shuffle(updates)
    return updates


def _runs(lengths: Sequence[int], users: Sequence[int], longest: int) -> list[list[int]]:
    """Return each user's rows by length, in runs of `longest` rows at most."""
    rows_of: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        rows_of.setdefault(users[row], []).append(row)
    return [rows[first : first + longest] for rows in rows_of.values() for first in range(0, len(rows), longest)]


def _fill(runs: list[list[int]], size: int) -> list[list[int]]:
    """Make updates of `size` rows out of runs: the next run that fits; where none of the next few does, one is cut."""
    updates: list[list[int]] = [[]]
    while runs:
        room = size - len(updates[-1])
        if room == 0:
            updates.append([])
            continue
        fitting = next((place for place, run in enumerate(runs[:LOOK_AHEAD]) if len(run) <= room), None)
        if fitting is None:
            updates[-1].extend(runs[0][:room])
            runs[0] = runs[0][room:]
        else:
            updates[-1].extend(runs.pop(fitting))
    return updates


def plan_passes(
    rows: Sequence[int],
    lengths: Mapping[int, int],
    users: Sequence[int] | None,
    num_processes: int,
    accumulation: int,
    max_tokens: int | None,
) -> list[list[list[int]]]:
    """Return the row numbers of each process and pass; all make as many passes, the last of some without rows.

    Args:
        rows: row numbers of the update, over all processes.
        lengths: tokens of a row by its number, virtual ones among them.
        users: the user of a row by its number, where a user's rows take one pass; None where each runs alone.
        num_processes: that share the update.
        accumulation: passes of each process where `max_tokens` does not ask for more.
        max_tokens: slots per pass, see `split_by_tokens`; None is no limit.
    """
    passes = []
    for process in range(num_processes):
        shares = share_of(rows, process, num_processes, accumulation)
        if max_tokens is not None:
            shares = [part for share in shares for part in split_by_tokens(share, lengths, max_tokens, users)]
        passes.append(shares)
    most = max(map(len, passes))
    return [own + [[]] * (most - len(own)) for own in passes]


def share_of(update: Sequence[int], process: int, num_processes: int, accumulation: int) -> list[list[int]]:
    """Cut one update into the micro-batches of one process, neighbours together, as even as they can be.

    Over all processes each row occurs once; some of the `accumulation` lists are empty where rows are fewer.
    """
    slots = num_processes * accumulation
    each, more = divmod(len(update), slots)
    starts = [slot * each + min(slot, more) for slot in range(slots + 1)]
    return [list(update[starts[slot] : starts[slot + 1]]) for slot in range(process, slots, num_processes)]


def split_by_tokens(
    rows: Sequence[int], lengths: Mapping[int, int], max_tokens: int, users: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut a micro-batch into passes of `max_tokens` slots at most, `rows x longest`; a longer row runs alone.

    Args:
        rows: row numbers, neighbours of similar length.
        lengths: tokens of a row by its number, virtual ones among them.
        max_tokens: slots per pass, padding among them.
        users: the user of a row by its number where a user's rows take one pass: the longest row, and a token for each
            other.
    """
    passes: list[list[int]] = [[]]
    longest, hosts = 0, set[int]()
    for row in rows:
        host = row if users is None else users[row]
        width, count = max(longest, lengths[row]), len(hosts | {host})
        slots = width * count + len(passes[-1]) + 1 - count
        if passes[-1] and slots > max_tokens:
            passes.append([])
            width, hosts = lengths[row], set()
        passes[-1].append(row)
        longest = width
        hosts.add(host)
    return passes
