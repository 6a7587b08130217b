"""Tables of items and events: in memory (pandas, `datasets`, dictionaries), or the two files of a folder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Unpack

from ...errors import ConfigurationError, DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import DEFAULT_MAX_REJECTED, ReadReport, Row, settled_report
from .text_files import TextOptions, json_rows, require_columns, table_rows

#: Columns that say when; where a table has both, the first counts.
TIME_COLUMNS = ("timestamp", "order")


def as_interactions(interactions: Any, items: Any = None, rejects_path: str | Path | None = None) -> Interactions:
    """Bring what a user has into histories over a catalog.

    Args:
        interactions: `Interactions`, which bring their own catalog, or a table as `interactions_from_tables` takes it.
        items: A table of items or a catalog; None with `Interactions`.
        rejects_path: Where to write rejected rows (JSON lines).

    Raises:
        ConfigurationError: There is no catalog, or there are two.
        DataError: As `interactions_from_tables`.
    """
    if isinstance(interactions, Interactions):
        if items is not None:
            raise ConfigurationError("items must be None where interactions bring their own catalog, got both")
        return interactions
    if items is None:
        raise ConfigurationError("items must be given with a table of interactions, got None")
    return interactions_from_tables(interactions, items, rejects_path=rejects_path)


def interactions_from_tables(
    interactions: Any,
    items: Any,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = None,
    id_column: str = "item_id",
    rejects_path: str | Path | None = None,
    max_rejected: float = DEFAULT_MAX_REJECTED,
    source: str = "tables",
) -> Interactions:
    """Read events and items out of tables in memory.

    A table is a pandas data frame, a `datasets.Dataset`, or an iterable of dictionaries. Ids become strings: 7 and
    7.0 are "7", and "007" stays "007". Keep ids as text in pandas (`dtype=str`): what it has read as numbers has
    lost its leading zeros.

    Args:
        interactions: One row an event.
        items: One row an item (`title` and any other columns), or a catalog.
        user_column: Column of user ids.
        item_column: Column of item ids in `interactions`.
        time_column: Column of times; by default `timestamp`, else `order`.
        id_column: Column of item ids in `items`.
        rejects_path: Where to write rejected rows (JSON lines).
        max_rejected: Largest share of rejected rows of one table, 0 to 1.
        source: Name for reports.

    Raises:
        DataError: A table is empty or has other columns, or too many rows were rejected.
    """
    with settled_report(rejects_path, max_rejected) as report:
        if not isinstance(items, ItemCatalog):
            items = ItemCatalog.from_rows(_rows(items, "items", report, (id_column,)), report, id_column)
        choices = TIME_COLUMNS if time_column is None else (time_column,)
        rows = _rows(interactions, "interactions", report, (user_column, item_column), choices)
        read = _timed_interactions(items, rows, report, source, (user_column, item_column), choices)
    return read


def read_folder(path: str | Path, report: ReadReport, **options: Unpack[TextOptions]) -> Interactions:
    """Read `items.jsonl` (`item_id`, `title`, any other columns) and `interactions.csv` of a folder.

    The table needs the columns `user_id`, `item_id` and one of `timestamp` (seconds, milliseconds or ISO 8601) and
    `order` (any number). All items of `items.jsonl` are in the catalog, bought or not.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. It must hold items.jsonl and interactions.csv.")
    items = ItemCatalog.from_rows(json_rows(folder / "items.jsonl", report, **options), report)
    columns = ("user_id", "item_id")
    events = table_rows(folder / "interactions.csv", report, columns, TIME_COLUMNS, **options)
    return _timed_interactions(items, events, report, folder.name, columns, TIME_COLUMNS)


def _timed_interactions(
    items: ItemCatalog,
    rows: Iterator[Row],
    report: ReadReport,
    source: str,
    columns: tuple[str, str],
    time_columns: Sequence[str],
) -> Interactions:
    """Read events by their columns of user and item, and the first time column found; `order` holds plain numbers."""
    first = list(islice(rows, 1))  # reads the header, so that the time column is known
    found = [name for row in first for name in time_columns if name in row.record]
    time = found[0] if found else time_columns[0]
    events = (Event.from_row(row, *columns, time) for row in chain(first, rows))
    return Interactions.from_events(items, events, report, source, scale_time=time != "order")


def _rows(
    table: Any, name: str, report: ReadReport, required: tuple[str, ...], any_of: tuple[str, ...] = ()
) -> Iterator[Row]:
    """Yield the rows of a table, numbered from 1; the columns are checked at the first."""
    if hasattr(table, "iloc") and hasattr(table, "to_dict"):  # a data frame; pandas need not be installed
        table = table.to_dict("records")
    if isinstance(table, (str, Mapping)) or not isinstance(table, Iterable):
        raise DataError(
            "A table must be a pandas data frame, a datasets.Dataset or an iterable of dictionaries, got "
            f"{type(table).__name__}."
        )
    number = 0
    for number, record in enumerate(table, start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"Row {number} of {name} must be a dictionary, got {type(record).__name__}.")
        if number == 1:
            require_columns([str(column) for column in record], name, required, any_of)
        report.add_row(name)
        yield Row(name, number, record)
    if number == 0:
        raise DataError(f"The table of {name} is empty.")
