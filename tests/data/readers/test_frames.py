"""Tables in memory."""

from pathlib import Path

import datasets
import pandas as pd
import pytest

from peft_bituning.data import ItemCatalog, as_interactions, interactions_from_tables
from peft_bituning.errors import ConfigurationError, DataError

ITEMS = [{"item_id": "007", "title": "Bond", "brand": None}, {"item_id": "b", "title": None, "brand": "X"}]
EVENTS = [
    {"user_id": 1, "item_id": "b", "timestamp": "2020-01-02"},
    {"user_id": 1, "item_id": "007", "timestamp": "2020-01-01"},
    {"user_id": 2, "item_id": "b", "timestamp": "2020-01-01"},
]


@pytest.mark.parametrize(
    "form", [list, pd.DataFrame, datasets.Dataset.from_list, iter, lambda rows: pd.DataFrame(rows).convert_dtypes()]
)
def test_every_form_of_table_gives_the_same(form) -> None:
    data = interactions_from_tables(form(EVENTS), form(ITEMS))
    assert (data.user_ids, data.histories) == (("1", "2"), ((0, 1), (1,)))
    assert data.items.attributes == ({"title": "Bond"}, {"brand": "X"})
    assert data.report.rows_read == {"items": 2, "interactions": 3}


def test_numbers_with_gaps_and_dates_of_pandas() -> None:
    events = pd.DataFrame(
        {"u": [1, None, 2], "i": ["b", "b", "007"], "when": pd.to_datetime(["2020-01-01", None, "2021-01-01"])}
    )
    items = ItemCatalog.from_records(ITEMS)
    options = {"user_column": "u", "item_column": "i", "time_column": "when"}
    data = interactions_from_tables(events, items, max_rejected=0.5, **options)
    assert data.user_ids == ("1", "2")
    assert data.report.counts == {"missing_user_id": 1}
    assert data.items is items
    with pytest.raises(DataError, match="1 of 3 rows of interactions were rejected"):
        interactions_from_tables(events, items, **options)


def test_order_columns_are_numbers() -> None:
    events = [{"user_id": "u", "item_id": "b", "order": 2e11}, {"user_id": "u", "item_id": "007", "order": 9e10}]
    assert interactions_from_tables(events, ITEMS).histories == ((0, 1),)


def test_rejects_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    events = [*EVENTS, {"user_id": "u", "item_id": "zz", "timestamp": 1}]
    interactions_from_tables(events, ITEMS, rejects_path=path, max_rejected=0.25)
    assert '"line": 4' in path.read_text()


@pytest.mark.parametrize(
    ("events", "items", "message"),
    [
        ([], ITEMS, "The table of interactions is empty"),
        (EVENTS, [], "The table of items is empty"),
        (
            [{"user": 1}],
            ITEMS,
            "interactions must have the columns user_id, item_id and one of timestamp, order; found user",
        ),
        (EVENTS, [{"asin": 1}], "items must have the columns item_id; found asin"),
        ([("u", "b", 1)], ITEMS, "Row 1 of interactions must be a dictionary, got tuple"),
        ("events.csv", ITEMS, "A table must be a pandas data frame.*got str"),
        (3, ITEMS, "got int"),
    ],
)
def test_wrong_tables_are_errors(events, items, message: str) -> None:
    with pytest.raises(DataError, match=message):
        interactions_from_tables(events, items)


def test_what_a_user_has_becomes_interactions(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    data = as_interactions(EVENTS, ITEMS, path)
    assert (data.histories, path.read_text()) == (((0, 1), (1,)), "")
    assert as_interactions(data) is data
    with pytest.raises(ConfigurationError, match="items must be None where interactions bring their own .*, got both"):
        as_interactions(data, ITEMS)
    with pytest.raises(ConfigurationError, match="items must be given with a table of interactions, got None"):
        as_interactions(EVENTS)
