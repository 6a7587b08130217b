"""The dumps of 2014 and 2018, with their field names and warts."""

import gzip
import json
from pathlib import Path

import pytest

from peft_bituning.data import Interactions, ReadReport
from peft_bituning.data.readers.amazon import category_path, clean_brand, clean_title, find_amazon2018, read_amazon2018
from peft_bituning.errors import DataError

SCRIPT = "\n\n\nvar aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();"
META = [
    {
        "asin": "0007",
        "title": "Caliper &amp; case",
        "brand": "by\n    \n    iGaging",
        "category": ["Industrial", "Test", "Calipers"],
    },
    {
        "asin": "B1",
        "title": '<span id="productTitle" class="a-size-large">O-Ring</span>',
        "brand": "Visit Amazon's Seal Page",
        "category": ["Industrial"],
    },
    {"asin": "B2", "title": SCRIPT, "brand": "", "category": []},
    {
        "asin": "B1",
        "title": '<span id="productTitle" class="a-size-large">O-Ring</span>',
        "brand": "Visit Amazon's Seal Page",
        "category": ["Industrial"],
    },
    {"asin": "B3", "title": "Never bought"},
    {"asin": "B4", "category": ["Industrial", "Lab", "</span></span></span>"]},
]
REVIEWS = [
    {"reviewerID": "A1", "asin": "B1", "unixReviewTime": 300, "reviewTime": "01 1, 1970", "overall": 5.0},
    {"reviewerID": "A1", "asin": "0007", "unixReviewTime": 200, "reviewText": "ünï"},
    {"reviewerID": "A1", "asin": "B2", "reviewTime": "09 13, 2009"},
    {"reviewerID": "A2", "asin": "B4", "unixReviewTime": 100},
    {"reviewerID": "A2", "asin": "B4", "unixReviewTime": 100},
    {"reviewerID": "A2", "asin": "gone", "unixReviewTime": 100},
    {"asin": "B4", "unixReviewTime": 100},
    {"reviewerID": "A2", "asin": "B1", "reviewTime": "some day"},
]


def write(path: Path, records: list[dict], python: bool = False) -> Path:
    lines = [repr(record) if python else json.dumps(record) for record in records]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def read(folder: Path, python: bool = False) -> tuple[Interactions, ReadReport]:
    report = ReadReport()
    reviews = write(folder / "Shop_5.json.gz", REVIEWS, python)
    return read_amazon2018(reviews, write(folder / "meta_Shop.json.gz", META, python), report), report


@pytest.mark.parametrize("python", [False, True])
def test_reviews_and_metadata_are_joined_and_cleaned(tmp_path: Path, python: bool) -> None:
    data, report = read(tmp_path, python)
    assert dict(zip(data.items.item_ids, data.items.attributes, strict=True)) == {
        "0007": {"title": "Caliper & case", "brand": "iGaging", "category": "Test Calipers"},
        "B1": {"title": "O-Ring", "brand": "Seal"},
        "B2": {},
        "B4": {"category": "Lab"},
    }
    assert (data.user_ids, data.histories) == (("A1", "A2"), ((0, 1, 2), (3,)))
    assert report.counts == {
        "duplicate_item": 1,
        "unknown_item": 1,
        "missing_user_id": 1,
        "bad_timestamp": 1,
        "duplicate_event": 1,
    }
    assert report.notes == {"items_without_events": 1, "items_without_title": 2}


def test_the_old_form_of_categories(tmp_path: Path) -> None:
    assert category_path([["Toys & Games", "Puzzles", "3-D"], ["Other", "x"]]) == "Puzzles 3-D"
    assert category_path("Toys") == category_path([]) == category_path([["Toys"]]) == category_path(None) == ""


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Tube <5 mm", "Tube <5 mm"),
        ("a<br />b", "a b"),
        (None, ""),
        (SCRIPT, ""),
        ("<span class=", ""),
        ("Size < L", "Size < L"),
    ],
)
def test_titles_lose_markup_and_keep_signs(title: object, expected: str) -> None:
    assert clean_title(title) == expected


def test_brands_lose_the_words_of_the_page() -> None:
    assert clean_brand("by Design") == "by Design"
    assert clean_brand("<a href='x'>") == clean_brand(None) == clean_brand([]) == ""


def test_a_folder_with_one_of_each_is_enough(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold one file reviews_.*found none"):
        find_amazon2018(tmp_path)
    read(tmp_path)
    assert find_amazon2018(tmp_path) == (tmp_path / "Shop_5.json.gz", tmp_path / "meta_Shop.json.gz")
    write(tmp_path / "reviews_Other_5.json.gz", REVIEWS)
    with pytest.raises(DataError, match="found Shop_5.json.gz, reviews_Other_5.json.gz"):
        find_amazon2018(tmp_path)


def test_broken_lines_and_empty_files(tmp_path: Path) -> None:
    report = ReadReport()
    meta = write(tmp_path / "meta_Shop.json.gz", META)
    reviews = tmp_path / "Shop_5.json"
    reviews.write_text(json.dumps(REVIEWS[0]) + '\n{"reviewerID": "A1", "asi\n')
    assert read_amazon2018(reviews, meta, report).num_events == 1
    assert report.counts["broken_json"] == 1
    reviews.write_text("")
    with pytest.raises(DataError, match="Shop_5.json is empty"):
        read_amazon2018(reviews, meta, ReadReport())
