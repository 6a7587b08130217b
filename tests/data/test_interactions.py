"""Histories in time order, rejected rows, cuts and counts."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.data import Interactions, ItemCatalog
from peft_bituning.errors import DataError, UnknownItemError

ITEMS = ItemCatalog.from_records([{"item_id": name, "title": name} for name in "abcd"])


def test_events_are_ordered_by_time_and_ties_by_the_file() -> None:
    events = [("u", "c", 5), ("v", "a", 1), ("u", "b", 3), ("u", "a", 3), ("u", "d", "1970-01-01T00:00:01")]
    read = Interactions.from_events(ITEMS, events)
    assert read.user_ids == ("u", "v")
    assert read.histories == ((3, 1, 0, 2), (0,))


@given(st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from("abcd"), st.integers(0, 3)), min_size=1))
def test_ordering_is_stable_and_loses_only_duplicates(events: list[tuple[str, str, int]]) -> None:
    read = Interactions.from_events(ITEMS, events)
    for user, history in zip(read.user_ids, read.histories, strict=True):
        own = list(dict.fromkeys((time, item) for name, item, time in events if name == user))
        assert [ITEMS.item_ids[item] for item in history] == [item for _, item in sorted(own, key=lambda row: row[0])]
    assert read.num_events + read.report.counts.get("duplicate_event", 0) == len(events)


def test_bad_events_are_rejected_by_kind() -> None:
    events = [
        ("u", "a", 1),
        (None, "a", 1),
        ("u", "", 1),
        ("u", "zz", 1),
        ("u", "a", "soon"),
        ("u", "a", float("nan")),
        ("u", "a", None),
        ("u", "a", 1.0),
        ("u", "a", 2),
    ]
    read = Interactions.from_events(ITEMS, events)
    assert read.histories == ((0, 0),)
    assert [(row.kind, row.line) for row in read.report.rejected] == [
        ("missing_user_id", 2),
        ("missing_item_id", 3),
        ("unknown_item", 4),
        ("bad_timestamp", 5),
        ("bad_timestamp", 6),
        ("bad_timestamp", 7),
        ("duplicate_event", 8),
    ]
    assert "'soon' is not a point in time" in read.report.rejected[3].reason


def test_user_ids_of_mixed_types_stay_apart_from_padded_ones() -> None:
    assert Interactions.from_events(ITEMS, [("007", "a", 1), (7, "a", 1), (7.0, "b", 2)]).user_ids == ("007", "7")


def test_no_usable_event_is_an_error_that_counts() -> None:
    with pytest.raises(DataError, match="memory has no usable event.*'unknown_item': 1"):
        Interactions.from_events(ITEMS, [("u", "zz", 1)])
    with pytest.raises(DataError, match="no usable event"):
        Interactions.from_events(ITEMS, [])


def test_histories_given_in_order_keep_repeats() -> None:
    assert Interactions.from_histories(ITEMS, {"u": ["b", "b", "a"]}).histories == ((1, 1, 0),)
    with pytest.raises(UnknownItemError, match="'zz'"):
        Interactions.from_histories(ITEMS, {"u": ["zz"]})


def test_a_catalog_of_one_item_and_a_user_with_one_event() -> None:
    one = ItemCatalog.from_records([{"item_id": "only"}])
    read = Interactions.from_events(one, [("u", "only", 1)])
    assert read.histories == ((0,),)
    assert read.counts()["density"] == 1.0


def test_a_cut_of_users_is_seeded_and_keeps_the_catalog() -> None:
    read = Interactions.from_histories(ITEMS, {f"u{number}": ["a", "b"] for number in range(20)})
    cut = read.sample_users(5, seed=1)
    assert cut == read.sample_users(5, seed=1)
    assert cut.user_ids != read.sample_users(5, seed=2).user_ids
    assert list(cut.user_ids) == [user for user in read.user_ids if user in cut.user_ids]
    assert cut.items is read.items
    assert read.sample_users(100) is read
    with pytest.raises(DataError, match="at least one user, got n=0"):
        read.sample_users(0)


def test_the_hash_is_of_items_users_and_histories() -> None:
    def content(titles: str, histories: dict[str, list[str]], source: str = "memory") -> str:
        items = ItemCatalog.from_records([{"item_id": name, "title": titles} for name in "abc"])
        return Interactions.from_histories(items, histories, source).content_hash

    histories = {"u": ["a", "b"], "v": ["c"]}
    expected = hashlib.sha256(b'["a", "b", "c"]' + b'[["u", "v"], [[0, 1], [2]]]').hexdigest()
    assert content("x", histories) == content("y", histories, "elsewhere") == expected
    others = [{"u": ["b", "a"], "v": ["c"]}, {"w": ["a", "b"], "v": ["c"]}, {"u": ["a", "b", "c"]}]
    assert len({expected, *(content("x", other) for other in others)}) == 4


def test_counts_describe_the_data() -> None:
    items = ItemCatalog.from_records([{"item_id": "a", "title": "A"}, {"item_id": "b"}])
    counts = Interactions.from_events(items, [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "q", 1)]).counts()
    assert (counts["users"], counts["items"], counts["events"]) == (2, 2, 3)
    assert counts["average_length"] == 1.5
    assert counts["density"] == 0.75
    assert counts["rejected"] == {"unknown_item": 1}
    assert counts["notes"] == {"items_without_title": 1}
