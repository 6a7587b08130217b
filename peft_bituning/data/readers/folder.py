"""A folder of `items.jsonl` and `interactions.csv`."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Unpack

from ...errors import DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport, Row
from .text_files import TextOptions, json_rows, table_rows

#: Columns that say when; where a table has both, the first counts.
TIME_COLUMNS = ("timestamp", "order")


def read_folder(path: str | Path, report: ReadReport, **options: Unpack[TextOptions]) -> Interactions:
    """Read `items.jsonl` (`item_id`, `title`, any other columns) and `interactions.csv`.

    The table needs the columns `user_id`, `item_id` and one of `timestamp` (seconds, milliseconds or ISO 8601) and
    `order` (any number). All items of `items.jsonl` are in the catalog, bought or not.

    Args:
        path: The folder.
        report: Takes counts and rejected rows.
        **options: See `TextOptions`.

    Raises:
        DataError: A file is missing, empty or has other columns, or nothing usable is in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. It must hold items.jsonl and interactions.csv.")
    items = ItemCatalog.from_rows(json_rows(folder / "items.jsonl", report, **options), report)
    events = table_rows(folder / "interactions.csv", report, ("user_id", "item_id"), TIME_COLUMNS, **options)
    return timed_interactions(items, events, report, folder.name)


def timed_interactions(
    items: ItemCatalog,
    rows: Iterator[Row],
    report: ReadReport,
    source: str,
    columns: tuple[str, str] = ("user_id", "item_id"),
    time_columns: Sequence[str] = TIME_COLUMNS,
) -> Interactions:
    """Read events out of rows, by the first of the time columns that they have.

    Args:
        items: The catalog.
        rows: One row an event.
        report: Takes counts and rejected rows.
        source: Where the events came from.
        columns: Columns of user ids and of item ids.
        time_columns: Columns that say when; one named `order` holds plain numbers.

    Raises:
        DataError: No event is usable.
    """
    first = list(islice(rows, 1))  # reads the header, so that the time column is known
    found = [name for row in first for name in time_columns if name in row.record]
    time = found[0] if found else time_columns[0]
    events = (Event.from_row(row, *columns, time) for row in chain(first, rows))
    return Interactions.from_events(items, events, report, source, scale_time=time != "order")
