"""The catalog: which items exist, in a fixed order, and what is known of each."""

import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..artifacts import whole_file
from ..errors import DataError, UnknownItemError
from .rejects import ReadReport, Row
from .values import as_id, as_text


@dataclass(frozen=True)
class ItemCatalog:
    """Items in a fixed order; an item's place in it is its index everywhere else.

    Args:
        item_ids: The I ids, the user's own strings, each once.
        attributes: One dictionary an item, column to text. `title` is expected but may be missing; a missing
            attribute is left out, never empty.

    Raises:
        DataError: An id occurs twice, or the two tuples differ in length.
    """

    item_ids: tuple[str, ...]
    attributes: tuple[dict[str, str], ...]

    def __post_init__(self) -> None:
        if len(self.item_ids) != len(self.attributes):
            raise DataError(
                f"A catalog needs one attribute dictionary an item, got {len(self.attributes)} for "
                f"{len(self.item_ids)} items."
            )
        if len(self.index) != len(self.item_ids):
            twice = [item for item, number in Counter(self.item_ids).items() if number > 1]
            raise DataError(f"Item ids must be unique; given more than once: {_listed(twice)}. Keep one row of each.")

    def __len__(self) -> int:
        """Return the number of items I."""
        return len(self.item_ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """Item id to index, 0 to I - 1."""
        return {item: position for position, item in enumerate(self.item_ids)}

    @cached_property
    def text_columns(self) -> tuple[str, ...]:
        """The columns any item has, in order of first appearance, without `title`."""
        return tuple(dict.fromkeys(column for row in self.attributes for column in row if column != "title"))

    def indices_of(self, item_ids: Sequence[str]) -> list[int]:
        """Return the indices of items, in the order given; an UnknownItemError names those not in the catalog."""
        unknown = list(dict.fromkeys(item for item in item_ids if item not in self.index))
        if unknown:
            raise UnknownItemError(
                f"Not in the catalog of {len(self)} items: {_listed(unknown)}. Ids are strings, compared exactly; "
                "leave these out, or add the items to the catalog first."
            )
        return [self.index[item] for item in item_ids]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], id_column: str = "item_id") -> "ItemCatalog":
        """Build a catalog from one record (column to value) an item, in catalog order.

        Text is cleaned: HTML entities decoded, whitespace collapsed, missing and blank values left out. A DataError
        says that a record has no id, or that an id occurs twice.
        """
        rows: list[tuple[str, dict[str, str]]] = []
        for row, record in enumerate(records, start=1):
            item_id = as_id(record.get(id_column))
            if item_id is None:
                raise DataError(
                    f"Item {row} has no usable {id_column!r} (got {record.get(id_column)!r}); its columns are "
                    f"{sorted(map(str, record))}. Name the column of ids with id_column=."
                )
            rows.append((item_id, _text_attributes(record, id_column)))
        return cls(tuple(item_id for item_id, _ in rows), tuple(attributes for _, attributes in rows))

    @classmethod
    def from_rows(
        cls, rows: Iterable[Row], report: ReadReport, id_column: str = "item_id", keep: Container[str] | None = None
    ) -> "ItemCatalog":
        """Build a catalog from the rows of a file, one an item, rejecting those that cannot be used.

        A row without an id is rejected as `missing_item_id`; an id that comes again as `duplicate_item`, or as
        `conflicting_item` where its text differs: the first row stays. Ids that are not among those to `keep` are
        passed over and noted as `items_without_events`; `None` keeps all. It is a DataError if no item is left.
        """
        kept: dict[str, dict[str, str]] = {}
        file, columns = "the items", "none"
        for row in rows:
            if not kept:
                file, columns = row.file, ", ".join(map(str, row.record)) or "none"
            item_id = as_id(row.record.get(id_column))
            if item_id is None:
                reason = f"no usable {id_column}, got {row.record.get(id_column)!r}"
                report.reject("missing_item_id", row.file, row.line, reason)
            elif keep is not None and item_id not in keep:
                report.note("items_without_events")
            else:
                attributes = _text_attributes(row.record, id_column)
                first = kept.setdefault(item_id, attributes)
                if first != attributes:
                    reason = f"item {item_id!r} came before with other text"
                    report.reject("conflicting_item", row.file, row.line, reason)
                elif first is not attributes:
                    report.reject("duplicate_item", row.file, row.line, f"item {item_id!r} came before")
        if not kept:
            raise DataError(
                f"No usable item in {file}: expected a column {id_column}, found {columns}; rejected "
                f"{report.counts or 'none'}, without events {report.notes.get('items_without_events', 0)}."
            )
        return cls(tuple(kept), tuple(kept.values()))

    def extended(self, records: Iterable[Mapping[str, Any]], id_column: str = "item_id") -> "ItemCatalog":
        """Return a catalog with new items, which a DataError names if they are known, after the present ones."""
        new = ItemCatalog.from_records(records, id_column)
        known = [item for item in new.item_ids if item in self.index]
        if known:
            raise DataError(f"Already in the catalog: {_listed(known)}. Only new items can be added.")
        return ItemCatalog(self.item_ids + new.item_ids, self.attributes + new.attributes)

    def to_jsonl(self, path: str | Path) -> None:
        """Write one JSON object an item: `item_id`, then its attributes."""
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
            for item_id, row in zip(self.item_ids, self.attributes, strict=True):
                stream.write(json.dumps({"item_id": item_id, **row}, ensure_ascii=False) + "\n")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "ItemCatalog":
        """Read back exactly what `to_jsonl` wrote, else raise a DataError; others' files are `load_interactions`'s."""
        name = Path(path).name
        rows: list[tuple[str, dict[str, str]]] = []
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"The saved catalog {name} cannot be read: {error}.") from error
        if lines.pop():
            raise DataError(f"The saved catalog {name} ends in the middle of a line; copy it again.")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{name} line {number} is not JSON ({error}); copy the file again.") from error
            if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
                raise DataError(f"{name} line {number} must be an object of strings, got {line[:80]!r}.")
            if not record.get("item_id"):
                raise DataError(f"{name} line {number} has no item_id, got {line[:80]!r}.")
            rows.append((record.pop("item_id"), record))
        return cls(tuple(item_id for item_id, _ in rows), tuple(attributes for _, attributes in rows))


def _text_attributes(record: Mapping[str, Any], id_column: str) -> dict[str, str]:
    """Return the attributes of a record as clean text, without the id and missing ones."""
    cleaned = {str(key): as_text(value) for key, value in record.items() if key not in (id_column, "item_id")}
    return {key: value for key, value in cleaned.items() if value}


def _listed(values: Sequence[str], number: int = 10) -> str:
    """Return the first few values and how many more there are."""
    more = f" and {len(values) - number} more" if len(values) > number else ""
    return ", ".join(map(repr, values[:number])) + more
