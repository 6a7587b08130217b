"""Leave-one-out and the cuts of the training part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.data import Interactions, ItemCatalog, LeaveOneOut, Sample
from peft_bituning.errors import ConfigurationError, DataError

HISTORIES = [(0, 1, 2, 3, 4), (5, 6, 7), (8,), (9, 10)]


def test_last_item_tests_last_but_one_validates() -> None:
    split = LeaveOneOut(HISTORIES)
    assert split.samples("test") == [Sample(0, (0, 1, 2, 3), 4), Sample(1, (5, 6), 7)]
    assert split.samples("valid") == [Sample(0, (0, 1, 2), 3), Sample(1, (5,), 6)]
    assert split.train_sequences == [[0, 1, 2], [5], [8], [9, 10]]


def test_known_sequences_end_before_the_test_item() -> None:
    assert LeaveOneOut(HISTORIES).known_sequences == [[0, 1, 2, 3], [5, 6], [8], [9, 10]]
    assert LeaveOneOut(HISTORIES, training_users=[0, 2]).known_sequences == [[0, 1, 2, 3], [5, 6], [8], []]


def test_users_with_too_few_events_train_only_and_are_counted() -> None:
    split = LeaveOneOut(HISTORIES)
    assert split.users_not_evaluated == 2
    assert {sample.user for sample in split.training_samples()} == {0, 3}


def test_every_cut_has_an_item_before_and_one_after() -> None:
    samples = LeaveOneOut(HISTORIES).training_samples("every_cut")
    assert sorted(samples, key=lambda row: (row.user, len(row.history))) == [
        Sample(0, (0,), 1),
        Sample(0, (0, 1), 2),
        Sample(3, (9,), 10),
    ]


def test_last_cut_takes_the_longest() -> None:
    assert set(LeaveOneOut(HISTORIES).training_samples("last_cut")) == {Sample(0, (0, 1), 2), Sample(3, (9,), 10)}


@given(st.lists(st.lists(st.integers(0, 9), max_size=8)), st.integers(0, 3), st.integers(0, 3))
def test_a_random_cut_is_one_of_every_cut_and_repeats_with_its_seed(
    histories: list[list[int]], seed: int, epoch: int
) -> None:
    split = LeaveOneOut(histories)
    drawn = split.training_samples("random_cut", seed, epoch)
    assert drawn == split.training_samples("random_cut", seed, epoch)
    assert set(drawn) <= set(split.training_samples("every_cut"))
    assert len({sample.user for sample in drawn}) == len(drawn) == sum(len(part) > 1 for part in split.train_sequences)


def test_order_differs_between_seeds_and_epochs() -> None:
    split = LeaveOneOut([range(40)])
    orders = [split.training_samples(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(
        sorted(order, key=lambda row: row.target) == sorted(orders[0], key=lambda row: row.target) for order in orders
    )
    assert len({tuple(order) for order in orders}) == 4


def test_targets_never_reach_into_validation_or_test() -> None:
    split = LeaveOneOut([range(10)])
    assert max(sample.target for sample in split.training_samples()) == 7


def test_unknown_names_are_errors() -> None:
    split = LeaveOneOut(HISTORIES)
    with pytest.raises(ConfigurationError, match="strategy must be one of every_cut, random_cut, last_cut, got 'all'"):
        split.training_samples("all")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="split must be 'valid' or 'test', got 'train'"):
        split.samples("train")  # type: ignore[arg-type]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=30),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 3),
)
def test_shares_are_nested_and_train_alone(histories: list[list[int]], one: float, other: float, seed: int) -> None:
    whole = LeaveOneOut(histories)
    less, more = (whole.drawn(share, seed) for share in sorted((one, other)))
    assert less.samples("valid") == whole.samples("valid") and less.samples("test") == whole.samples("test")
    taught = {sample.user for sample in whole.training_samples()}
    users = [{sample.user for sample in split.training_samples()} for split in (less, more)]
    assert users[0] <= users[1] <= taught
    for share, drawn in zip(sorted((one, other)), users, strict=True):
        at_least_one = 1 if share and taught else 0
        assert len(drawn) == max(at_least_one, round(share * len(taught)))
    for user, sequence in enumerate(less.train_sequences):
        assert less is whole or sequence == (whole.train_sequences[user] if user in users[0] else [])


def test_seeds_draw_others_and_a_share_has_its_range() -> None:
    whole = LeaveOneOut([(0, 1, 2, 3)] * 40)
    draws = [whole.drawn(0.5, seed).training_users for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(draws[2] or ()) == 20
    assert whole.drawn(1) is whole and whole.drawn(0).training_samples() == []
    with pytest.raises(ConfigurationError, match=r"share must be from 0 to 1, got 1.5"):
        whole.drawn(1.5)


@pytest.mark.parametrize(
    ("items", "histories", "message"),
    [
        (1, [(0, 0, 0, 0)], "must have at least 2 items to rank, got 1; there is nothing to recommend"),
        (3, [(0, 1), (2,)], "no user has the three events that training, validation and test need; give longer"),
        (3, [(0, 1, 2)], "no user has the four events that a training row beside validation and test needs; give"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(items: int, histories: list[tuple[int, ...]], message: str) -> None:
    catalog = ItemCatalog(tuple(map(str, range(items))), ({},) * items)
    users = tuple(map(str, range(len(histories))))
    with pytest.raises(DataError, match=message):
        LeaveOneOut.of(Interactions(catalog, users, tuple(histories)))
    split = LeaveOneOut.of(Interactions(catalog.extended([{"item_id": "new"}]), ("u",), ((0, 0, 0, 0),)))
    assert split.samples("test") == [Sample(0, (0, 0, 0), 0)]


# ---------------------------------------------------------------------- items that are held out

items = st.integers(0, 9)
histories_of_users = st.lists(st.lists(items, max_size=8), max_size=20)


@given(histories_of_users, st.sets(items, max_size=6), st.one_of(st.none(), st.sets(st.integers(0, 19))))
def test_nothing_before_the_test_holds_a_held_out_item(
    histories: list[list[int]], held_out: set[int], training_users: set[int] | None
) -> None:
    split = LeaveOneOut(histories, training_users, held_out)
    assert split.held_out_items == held_out
    valid, test = split.samples("valid"), split.samples("test")
    for strategy in ("every_cut", "random_cut", "last_cut"):
        for sample in [*split.training_samples(strategy), *valid]:
            assert sample.history and not held_out & {*sample.history, sample.target}
    for sequence in [*split.train_sequences, *split.known_sequences, *(sample.history for sample in test)]:
        assert not held_out & set(sequence)
    # the test target stays, whatever it is; who has no other item before validation is not evaluated
    evaluated = [user for user, each in enumerate(histories) if len(each) >= 3 and set(each[:-2]) - held_out]
    assert [(sample.user, sample.target) for sample in test] == [(user, histories[user][-1]) for user in evaluated]
    assert split.users_not_evaluated == len(histories) - len(evaluated)
    assert [(sample.user, sample.target) for sample in valid] == [
        (user, histories[user][-2]) for user in evaluated if histories[user][-2] not in held_out
    ]
    for sample, end in [*((sample, -1) for sample in test), *((sample, -2) for sample in valid)]:
        assert list(sample.history) == [item for item in histories[sample.user][:end] if item not in held_out]


@given(histories_of_users, st.one_of(st.none(), st.sets(st.integers(0, 19))))
def test_holding_out_nothing_or_what_nobody_has_changes_nothing(
    histories: list[list[int]], training_users: set[int] | None
) -> None:
    plain = LeaveOneOut(histories, training_users)
    for held_out in ((), [10, 11]):
        split = LeaveOneOut(histories, training_users, held_out)
        for name in ("valid", "test"):
            assert split.samples(name) == plain.samples(name)
        assert split.train_sequences == plain.train_sequences and split.known_sequences == plain.known_sequences
        assert split.training_samples() == plain.training_samples()
        assert split.users_not_evaluated == plain.users_not_evaluated


@given(histories_of_users, st.sets(items, max_size=6), st.floats(0, 1), st.integers(0, 3))
def test_a_share_of_the_users_keeps_what_is_held_out(
    histories: list[list[int]], held_out: set[int], share: float, seed: int
) -> None:
    whole = LeaveOneOut(histories, held_out_items=held_out)
    drawn = whole.drawn(share, seed)
    assert drawn.held_out_items == held_out
    assert drawn.samples("valid") == whole.samples("valid") and drawn.samples("test") == whole.samples("test")
    assert drawn.users_not_evaluated == whole.users_not_evaluated
    for user, sequence in enumerate(drawn.train_sequences):
        kept = drawn.training_users is None or user in drawn.training_users
        assert sequence == (whole.train_sequences[user] if kept else [])


def interactions(num_items: int = 20, num_users: int = 30) -> Interactions:
    catalog = ItemCatalog(tuple(map(str, range(num_items))), ({},) * num_items)
    histories = tuple(tuple((user * 7 + step * step) % num_items for step in range(6)) for user in range(num_users))
    return Interactions(catalog, tuple(map(str, range(num_users))), histories)


def test_a_share_of_the_items_is_drawn_with_the_seed() -> None:
    data = interactions()
    for share, number in ((0.0, 0), (0.2, 4), (0.26, 5), (0.5, 10)):
        drawn = [LeaveOneOut.of(data, share, seed).held_out_items for seed in range(4)]
        assert [len(each) for each in drawn] == [number] * 4
        assert drawn == [LeaveOneOut.of(data, share, seed).held_out_items for seed in range(4)]
        assert len(set(drawn)) == (4 if number else 1)
        assert all(each <= set(range(20)) for each in drawn)
    less, more = (LeaveOneOut.of(data, share, 3).held_out_items for share in (0.2, 0.5))
    assert less < more
    assert LeaveOneOut.of(data).held_out_items == frozenset()
    assert len(LeaveOneOut.of(data, 0.01).held_out_items) == 0  # rounded


def test_items_are_drawn_from_the_catalog_not_by_popularity() -> None:
    """Over many seeds every item is held out about as often."""
    data = interactions()
    times = [0] * 20
    for seed in range(200):
        for item in LeaveOneOut.of(data, 0.25, seed).held_out_items:
            times[item] += 1
    assert sum(times) == 1000 and min(times) > 25 and max(times) < 80


@pytest.mark.parametrize("share", [-0.1, 1, 1.0, 1.5, float("nan")])
def test_shares_of_items_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ConfigurationError, match=r"hold_out_items must be a share in \[0, 1\), got"):
        LeaveOneOut.of(interactions(), share)


def test_holding_out_too_much_leaves_nobody() -> None:
    with pytest.raises(DataError, match="no user has the (three|four) events"):
        LeaveOneOut.of(interactions(), 0.999)
