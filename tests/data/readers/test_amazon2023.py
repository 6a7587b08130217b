"""Amazon-Reviews-2023 through a local stand-in for the Hub's download."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.data import Interactions, ReadReport
from peft_bituning.data.readers.amazon import CATEGORIES, REPOSITORY, REVISION, WITHOUT_SPLIT, core, read_amazon2023
from peft_bituning.errors import DataError

META = [
    {
        "parent_asin": "B1",
        "main_category": "Video Games",
        "title": "Pad &amp; case",
        "store": "Shop",
        "categories": ["Video Games", "PC", "Pads"],
        "details": {"Brand": "Acme"},
    },
    {"parent_asin": "007", "title": "Wheel", "store": "Shop", "categories": [], "details": '{"Color": "red"}'},
    {"parent_asin": "B3", "title": None, "store": None, "categories": ["Video Games"], "details": "{not json"},
]
HEADER = "user_id,parent_asin,rating,timestamp\n"


class Hub:
    """A folder that answers as `hf_hub_download` does, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def __call__(self, *, repo_id: str, filename: str, repo_type: str, revision: str) -> str:
        assert (repo_id, repo_type, revision) == (REPOSITORY, "dataset", REVISION)
        self.asked.append(filename)
        if not (self.folder / filename).is_file():
            raise EntryNotFoundError(f"404: {filename}")
        return str(self.folder / filename)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """Return a hub with the split of one category, header-only splits of another, raw reviews of a third."""
    rows = {
        "train": "u1,B1,5.0,1700000000500\nu2,B3,1.0,1600000000000\nu1,B3,5.0,1600000000000\n",
        "valid": "u1,007,4.0,1700000000600\nu2,007,2.0,1600000000000\n",
        "test": "u1,B1,4.0,1700000000700\nu2,B1,2.0,1600000000000\nu3,none,2.0,1600000000000\n",
    }
    for part, text in rows.items():
        put(tmp_path / f"benchmark/5core/last_out/Video_Games.{part}.csv", HEADER + text)
        put(tmp_path / f"benchmark/5core/last_out/Software.{part}.csv", HEADER)
    dense = [
        {"user_id": f"u{u}", "parent_asin": f"B{i}", "timestamp": 1600000000000 + i} for u in range(5) for i in range(5)
    ]
    extra = [
        {"user_id": "once", "parent_asin": "B1", "timestamp": 1},
        {"user_id": "u1", "parent_asin": "rare", "timestamp": 1},
        {"user_id": None, "parent_asin": "B1", "timestamp": 1},
    ]
    reviews = "".join(json.dumps(record) + "\n" for record in [*extra, *dense])
    meta = "".join(json.dumps(record) + "\n" for record in META)
    raw = "".join(
        json.dumps({"parent_asin": f"B{i}", "title": f"Thing {i}", "categories": []}) + "\n" for i in range(9)
    )
    put(tmp_path / "raw/meta_categories/meta_Video_Games.jsonl", meta)
    for category in ("Software", "Appliances"):
        put(tmp_path / f"raw/meta_categories/meta_{category}.jsonl", raw)
        put(tmp_path / f"raw/review_categories/{category}.jsonl", reviews)
    return Hub(tmp_path)


def read(category: str, hub: Hub) -> tuple[Interactions, ReadReport]:
    report = ReadReport()
    return read_amazon2023(category, report, download=hub), report


def test_the_parts_of_the_split_make_histories_in_time_order(hub: Hub) -> None:
    data, report = read("Video_Games", hub)
    ids = data.items.item_ids
    assert [[ids[item] for item in history] for history in data.histories] == [
        ["B3", "B1", "007", "B1"],
        ["B3", "007", "B1"],
    ]
    assert report.counts == {"unknown_item": 1}
    assert not any("review_categories" in name for name in hub.asked)


def test_items_have_title_brand_and_path_without_its_root(hub: Hub) -> None:
    data = read("Video_Games", hub)[0]
    assert data.items.attributes == (
        {"title": "Pad & case", "brand": "Acme", "category": "PC Pads"},
        {"title": "Wheel", "brand": "Shop"},
        {},
    )


@pytest.mark.parametrize("category", ["Appliances", "Software"])
def test_without_a_split_raw_reviews_are_cut_to_five_and_the_log_says_so(
    hub: Hub, caplog: pytest.LogCaptureFixture, category: str
) -> None:
    with caplog.at_level(logging.WARNING):
        data, report = read(category, hub)
    assert f"{category} has no five-core split" in caplog.text
    assert (len(data), data.num_events) == (5, 25)
    assert report.notes["below_five_core"] == 2
    assert report.counts == {"missing_user_id": 1}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=60), st.integers(1, 4))
def test_the_core_is_the_largest_one(pairs: list[tuple[int, int]], size: int) -> None:
    left = [pairs[place] for place in core(pairs, size)]
    for side in (0, 1):
        assert all(number >= size for number in Counter(pair[side] for pair in left).values())
    # Nothing can be put back: any core lies inside the one that cutting finds.
    assert [left[place] for place in core(left, size)] == left
    for pair in set(pairs) - set(left):
        again = [*left, *[other for other in pairs if other == pair]]
        assert len(core(again, size)) == len(left)


def test_a_local_folder_stands_in_for_the_hub(hub: Hub, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in list(tmp_path.rglob("*Video_Games*")):
        (flat / file.name).write_bytes(file.read_bytes())
    for root in (tmp_path, flat):
        assert read_amazon2023("Video_Games", ReadReport(), root=root).num_events == 7
    with pytest.raises(DataError, match="There is no file raw/review_categories/Books.jsonl"):
        read_amazon2023("Books", ReadReport(), root=flat)


def test_an_unknown_category_lists_the_known_ones(hub: Hub) -> None:
    assert len(CATEGORIES) == 34  # 33 and "Unknown"
    assert set(CATEGORIES) > WITHOUT_SPLIT
    with pytest.raises(DataError, match="no category 'Toys'. It has: All_Beauty, .*Toys_and_Games"):
        read("Toys", hub)
    assert hub.asked == []


def test_no_connection_is_not_a_missing_split(hub: Hub) -> None:
    def offline(**_: str) -> str:
        raise LocalEntryNotFoundError("offline")

    def absent(**_: str) -> str:
        raise EntryNotFoundError("absent")

    with pytest.raises(DataError, match="cannot be fetched from the Hub. Check the connection"):
        read_amazon2023("Video_Games", ReadReport(), download=offline)
    with pytest.raises(DataError, match="There is no file raw/review_categories/Video_Games.jsonl"):
        read_amazon2023("Video_Games", ReadReport(), download=absent)


def test_wrong_columns_are_an_error(hub: Hub) -> None:
    put(hub.folder / "benchmark/5core/last_out/Video_Games.train.csv", "user_id,asin,timestamp\nu,B1,1\n")
    with pytest.raises(DataError, match="user_id, parent_asin, timestamp; found user_id, asin, timestamp"):
        read("Video_Games", hub)
