"""Tables in memory: pandas data frames, `datasets` data sets, iterables of dictionaries."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..interactions import Interactions
from ..items import ItemCatalog
from ..rejects import DEFAULT_MAX_REJECTED, ReadReport, Row, settled_report
from .folder import TIME_COLUMNS, timed_interactions
from .text_files import require_columns


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
        read = timed_interactions(items, rows, report, source, (user_column, item_column), choices)
    return read


def _rows(
    table: Any, name: str, report: ReadReport, required: tuple[str, ...], any_of: tuple[str, ...] = ()
) -> Iterator[Row]:
    """Yield the rows of a table, numbered from 1; the columns are checked at the first."""
    number = 0
    for number, record in enumerate(_records(table), start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"Row {number} of {name} must be a dictionary, got {type(record).__name__}.")
        if number == 1:
            require_columns([str(column) for column in record], name, required, any_of)
        report.add_row(name)
        yield Row(name, number, record)
    if number == 0:
        raise DataError(f"The table of {name} is empty.")


def _records(table: Any) -> Iterable[Any]:
    """Return the rows of a table; a data frame is known by its `to_dict`, so pandas need not be installed."""
    if hasattr(table, "iloc") and hasattr(table, "to_dict"):
        return table.to_dict("records")
    if isinstance(table, (str, Mapping)) or not isinstance(table, Iterable):
        raise DataError(
            "A table must be a pandas data frame, a datasets.Dataset or an iterable of dictionaries, got "
            f"{type(table).__name__}."
        )
    return table
