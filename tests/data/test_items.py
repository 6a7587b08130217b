"""The catalog: ids, attributes, extension, and its file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.data import ItemCatalog, ReadReport
from peft_bituning.data.rejects import Row
from peft_bituning.errors import DataError, UnknownItemError

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


def test_attributes_are_clean_and_missing_ones_left_out(catalog: ItemCatalog) -> None:
    assert catalog.item_ids == ("007", "8", "x", "y")
    assert catalog.attributes[1] == {"title": "Steel kettle", "category": "kitchen"}
    assert catalog.attributes[3]["title"] == "Rope & drill"
    assert catalog.text_columns == ("brand", "category")


def test_indices_follow_the_order_given(catalog: ItemCatalog) -> None:
    assert catalog.indices_of(["y", "007", "y"]) == [3, 0, 3]


def test_all_unknown_ids_are_named_at_once(catalog: ItemCatalog) -> None:
    with pytest.raises(UnknownItemError, match=r"catalog of 4 items: '7', 'z'\."):
        catalog.indices_of(["007", "7", "z", "7"])


def test_mixed_id_types_become_strings() -> None:
    assert ItemCatalog.from_records([{"item_id": "007"}, {"item_id": 7}, {"item_id": 8.0}]).item_ids == (
        "007",
        "7",
        "8",
    )


def test_extended_keeps_the_present_indices(catalog: ItemCatalog) -> None:
    longer = catalog.extended([{"item_id": "new", "title": "Glove"}])
    assert longer.item_ids[:4] == catalog.item_ids
    assert longer.indices_of(["new"]) == [4]
    assert len(catalog) == 4
    with pytest.raises(DataError, match="Already in the catalog: '8'"):
        catalog.extended([{"item_id": 8}])


def test_duplicate_and_missing_ids_are_errors() -> None:
    with pytest.raises(DataError, match="more than once: 'a'"):
        ItemCatalog.from_records([{"item_id": "a"}, {"item_id": "a"}])
    with pytest.raises(DataError, match=r"Item 2 has no usable 'item_id' \(got None\); its columns are \['asin'\]"):
        ItemCatalog.from_records([{"item_id": "a"}, {"asin": "b"}])
    with pytest.raises(DataError, match="one attribute dictionary an item, got 0 for 1"):
        ItemCatalog(("a",), ())


@given(st.dictionaries(TEXT, st.dictionaries(TEXT.filter(lambda name: name != "item_id"), TEXT), min_size=1))
def test_the_saved_catalog_comes_back_the_same(tmp_path_factory: pytest.TempPathFactory, rows: dict) -> None:
    path = tmp_path_factory.mktemp("catalog") / "items.jsonl"
    catalog = ItemCatalog(tuple(rows), tuple(rows.values()))
    catalog.to_jsonl(path)
    assert ItemCatalog.from_jsonl(path) == catalog


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"item_id": "a"}\n{"item_id": ', "ends in the middle of a line"),
        ('{"item_id": "a"\n', "line 1 is not JSON"),
        ('{"item_id": 7}\n', "line 1 must be an object of strings"),
        ('{"title": "t"}\n', "line 1 has no item_id"),
        ('{"item_id": "a"}\n{"item_id": "a"}\n', "more than once"),
    ],
)
def test_a_damaged_saved_catalog_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        ItemCatalog.from_jsonl(path)


def test_from_rows_rejects_by_kind_and_keeps_the_first() -> None:
    report = ReadReport()
    records = [{"item_id": "a", "title": "A"}, {"title": "none"}, {"item_id": "a", "title": "A"}, {"item_id": "a"}]
    catalog = ItemCatalog.from_rows((Row("f", n, record) for n, record in enumerate(records, start=1)), report)
    assert catalog.attributes == ({"title": "A"},)
    assert [(row.kind, row.line) for row in report.rejected] == [
        ("missing_item_id", 2),
        ("duplicate_item", 3),
        ("conflicting_item", 4),
    ]


def test_from_rows_names_the_columns_found_when_no_item_is_left() -> None:
    with pytest.raises(DataError, match="No usable item in f: expected a column item_id, found asin, title"):
        ItemCatalog.from_rows([Row("f", 1, {"asin": "a", "title": "A"})], ReadReport())
