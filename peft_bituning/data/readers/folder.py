"""A folder of `items.jsonl` and `interactions.csv`."""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from ...errors import DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport
from .text_files import json_rows, require_columns, table_rows

#: Columns that say when; where a table has both, the first counts.
TIME_COLUMNS = ("timestamp", "order")


def read_folder(
    path: str | Path, report: ReadReport, *, fallback_encoding: str | None = None, progress: bool = False
) -> Interactions:
    """Read `items.jsonl` (`item_id`, `title`, any other columns) and `interactions.csv`.

    The table needs the columns `user_id`, `item_id` and one of `timestamp` (seconds, milliseconds or ISO 8601) and
    `order` (any number). All items of `items.jsonl` are in the catalog, bought or not.

    Args:
        path: The folder.
        report: Takes counts and rejected rows.
        fallback_encoding: Encoding of lines that are not UTF-8.
        progress: Show progress bars.

    Raises:
        DataError: A file is missing, empty or has other columns, or nothing usable is in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. It must hold items.jsonl and interactions.csv.")
    rows = json_rows(folder / "items.jsonl", report, fallback_encoding=fallback_encoding, progress=progress)
    items = ItemCatalog.from_rows(rows, report)
    time_column = ""

    def check(found: Sequence[str], file: str) -> None:
        nonlocal time_column
        require_columns(found, file, ("user_id", "item_id"), TIME_COLUMNS)
        time_column = next(name for name in TIME_COLUMNS if name in found)

    table = table_rows(
        folder / "interactions.csv", report, check, fallback_encoding=fallback_encoding, progress=progress
    )
    first = list(islice(table, 1))  # reads the header, so that the time column is known
    events = (
        Event(row.record["user_id"], row.record["item_id"], row.record[time_column], row.file, row.line)
        for row in chain(first, table)
    )
    return Interactions.from_events(items, events, report, folder.name, scale_time=time_column == "timestamp")
