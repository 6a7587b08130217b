"""Updates and their shares: each row once, whatever the number of processes."""

from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.training.batches import BUCKET_BATCHES, plan_updates, share_of

LENGTHS = st.lists(st.integers(1, 500), max_size=400)
SIZES = st.integers(1, 17)


@given(LENGTHS, SIZES, st.integers(0, 5), st.integers(0, 5))
def test_plan_covers_each_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    updates = plan_updates(lengths, size, seed, epoch)
    assert sorted(row for update in updates for row in update) == list(range(len(lengths)))
    assert len(updates) == -(-len(lengths) // size)
    assert sum(len(update) < size for update in updates) <= 1
    assert updates == plan_updates(lengths, size, seed, epoch)


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
