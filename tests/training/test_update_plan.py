"""Updates and their shares: each row once, whatever the number of processes."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.training.update_plan import BUCKET_BATCHES, plan_passes, plan_updates, share_of, split_by_tokens

LENGTHS = st.lists(st.integers(1, 500), max_size=400)
SIZES = st.integers(1, 17)


@given(LENGTHS, SIZES, st.integers(0, 5), st.integers(0, 5))
def test_plan_covers_each_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    updates = plan_updates(lengths, size, seed, epoch)
    assert sorted(row for update in updates for row in update) == list(range(len(lengths)))
    assert len(updates) == -(-len(lengths) // size)
    assert sum(len(update) < size for update in updates) <= 1
    assert updates == plan_updates(lengths, size, seed, epoch)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 500)), max_size=300), SIZES, st.integers(0, 3))
def test_plan_of_whole_users(rows: list[tuple[int, int]], size: int, epoch: int) -> None:
    users, lengths = [user for user, _ in rows], [length for _, length in rows]
    updates = plan_updates(lengths, size, 0, epoch, users)
    assert sorted(row for update in updates for row in update) == list(range(len(rows)))
    assert len(updates) == -(-len(rows) // size)
    assert sum(len(update) < size for update in updates) <= 1
    assert updates == plan_updates(lengths, size, 0, epoch, users)


def made_up_histories() -> list[int]:
    """Items of the training histories of 2,000 users: most short, some long."""
    generator = random.Random(0)
    return [2 + int(generator.expovariate(1 / 4)) for _ in range(2000)]


def test_token_slots_over_needed_tokens() -> None:
    """Length buckets leave less than 5 % of padding; random batches would double the work."""
    lengths = [67 + 26 * cut for items in made_up_histories() for cut in range(1, items)]
    for size in (4, 8, 16, 32):
        slots = sum(len(update) * max(lengths[row] for row in update) for update in plan_updates(lengths, size, 0, 0))
        assert slots / sum(lengths) <= 1.05
    rows = random.Random(0).sample(range(len(lengths)), len(lengths))
    batches = [rows[first : first + 8] for first in range(0, len(rows), 8)]
    assert sum(len(batch) * max(lengths[row] for row in batch) for batch in batches) / sum(lengths) > 1.5


def test_a_users_rows_meet_in_one_update() -> None:
    """Few users are cut in two by the end of an update."""
    rows = [(user, cut) for user, items in enumerate(made_up_histories()) for cut in range(1, items)]
    users, lengths = [user for user, _ in rows], [67 + 26 * cut for _, cut in rows]
    for size in (8, 16):
        updates = plan_updates(lengths, size, 0, 0, users)
        passes = sum(len({users[row] for row in update}) for update in updates)
        fewest = sum(-(-users.count(user) // size) for user in set(users))
        assert passes <= 1.25 * fewest
        for update in updates:  # a user's cuts are neighbours, the shortest first
            order = [(users[row], lengths[row]) for row in update]
            assert len({user for user, _ in order}) == 1 + sum(a != b for (a, _), (b, _) in pairwise(order))
            assert all(a[1] < b[1] for a, b in pairwise(order) if a[0] == b[0])


def test_plan_differs_by_epoch_and_seed() -> None:
    lengths = [10] * 64
    plans = [plan_updates(lengths, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(left != right for n, left in enumerate(plans) for right in plans[:n])


def test_rows_of_an_update_are_of_similar_length() -> None:
    lengths = [(37 * row) % 256 for row in range(4 * BUCKET_BATCHES)]
    spreads = [
        max(lengths[row] for row in update) - min(lengths[row] for row in update)
        for update in plan_updates(lengths, 4, 0, 0)
    ]
    assert max(spreads) <= 12


@given(st.lists(st.integers(0, 10_000), max_size=40, unique=True), st.integers(1, 5), st.integers(1, 4))
def test_shares_cover_each_row_once(update: list[int], processes: int, accumulation: int) -> None:
    shares = [share_of(update, process, processes, accumulation) for process in range(processes)]
    assert all(len(each) == accumulation for each in shares)
    assert sorted(row for each in shares for share in each for row in share) == sorted(update)
    sizes = [len(share) for each in shares for share in each]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(), min_size=1, max_size=12, unique=True), st.integers(1, 4))
def test_micro_batches_do_not_depend_on_processes(update: list[int], accumulation: int) -> None:
    """Two processes with n micro-batches see the rows of one process with 2 n."""
    two = [share_of(update, process, 2, accumulation) for process in range(2)]
    one = share_of(update, 0, 1, 2 * accumulation)
    assert one == [two[slot % 2][slot // 2] for slot in range(2 * accumulation)]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=20),
    st.integers(1, 300),
    st.booleans(),
)
def test_passes_stay_within_the_budget(rows: list[tuple[int, int]], budget: int, whole_users: bool) -> None:
    users = [user for user, _ in rows] if whole_users else None
    numbers = list(range(len(rows)))
    lengths = {number: length for number, (_, length) in enumerate(rows)}
    passes = split_by_tokens(numbers, lengths, budget, users)
    assert [row for each in passes for row in each] == numbers

    def slots(each: list[int]) -> int:
        hosts = len(each) if users is None else len({users[row] for row in each})
        return hosts * max(lengths[row] for row in each) + len(each) - hosts

    assert all(slots(each) <= budget or len(each) == 1 for each in passes)
    for one, two in pairwise(passes):  # none could have taken the next row
        assert slots([*one, two[0]]) > budget


def test_an_empty_micro_batch_is_one_pass() -> None:
    assert split_by_tokens([], {}, 10) == [[]]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=20),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 300) | st.none(),
)
def test_processes_make_as_many_passes(
    rows: list[tuple[int, int]], processes: int, accumulation: int, budget: int | None
) -> None:
    """Row numbers are not places: here they count by tens."""
    numbers = [10 * place for place in range(len(rows))]
    lengths = dict(zip(numbers, (length for _, length in rows), strict=True))
    users = [rows[number // 10][0] for number in range(10 * len(rows))]
    for whole_users in (users, None):
        passes = plan_passes(numbers, lengths, whole_users, processes, accumulation, budget)
        assert len(passes) == processes and len({len(each) for each in passes}) == 1
        assert sorted(row for each in passes for share in each for row in share) == numbers
        for process, each in enumerate(passes):
            expected = share_of(numbers, process, processes, accumulation)
            if budget is not None:
                parts = [split_by_tokens(share, lengths, budget, whole_users) for share in expected]
                expected = [part for each_part in parts for part in each_part]
            assert each == expected + [[]] * (len(each) - len(expected))
