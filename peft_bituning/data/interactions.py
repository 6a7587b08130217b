"""Purchase histories: for every user, the catalog indices of his events in time order."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from ..artifacts import sha256_of_json
from ..errors import DataError
from .items import ItemCatalog
from .rejects import ReadReport, Row
from .values import as_id, as_timestamp, shown

_Dated = tuple[float | int, int, str, int]  # order, catalog index, file, line

#: Given as `Event.order`: the events of a user are in time order as they come.
IN_FILE_ORDER = object()


class Event(NamedTuple):
    """One row of a source, values as they came: who, what and when, in which file and line.

    `order` is a time, a number that orders the user's events, or `IN_FILE_ORDER` where the row order counts.
    """

    user_id: Any
    item_id: Any
    order: Any
    file: str = "events"
    line: int = 0

    @classmethod
    def from_row(cls, row: Row, user: str = "user_id", item: str = "item_id", order: str = "timestamp") -> "Event":
        """Take the columns of a record that say who, what and when; what it lacks is None."""
        record = row.record
        return cls(record.get(user), record.get(item), record.get(order), row.file, row.line)


@dataclass(frozen=True)
class Interactions:
    """A catalog and the histories of users over it.

    Args:
        items: The catalog of I items.
        user_ids: The users' own ids, in order of first appearance.
        histories: Per user, catalog indices in time order; at least one each.
        report: What reading met.
        source: Where the events came from, one line.
    """

    items: ItemCatalog
    user_ids: tuple[str, ...]
    histories: tuple[tuple[int, ...], ...]
    report: ReadReport = field(default_factory=ReadReport)
    source: str = "memory"

    def __len__(self) -> int:
        """Return the number of users."""
        return len(self.user_ids)

    @property
    def num_events(self) -> int:
        """Events of all users."""
        return sum(map(len, self.histories))

    @cached_property
    def content_hash(self) -> str:
        """The sha256 (hex) over item ids, user ids and histories, by which a resumed run knows its data."""
        return sha256_of_json(self.items.item_ids, [self.user_ids, self.histories])

    @classmethod
    def from_events(
        cls,
        items: ItemCatalog,
        events: Iterable[Event | tuple[Any, Any, Any]],
        report: ReadReport | None = None,
        source: str = "memory",
        scale_time: bool = True,
    ) -> "Interactions":
        """Group events by user and order them by time, ties by their order in the file.

        Rows without a user id, without an item id, with an item the catalog lacks, or with a time that is not one
        are rejected by kind. Of events equal in user, item and time the first stays and the others are rejected as
        `duplicate_event`; the same item at another time is a repeated purchase and stays.

        Args:
            items: The catalog.
            events: The events in file order, or (user id, item id, order) alone.
            report: Where rejected rows go; a new report when left out.
            source: Where the events came from, one line.
            scale_time: Take large numbers as milliseconds or finer; off for plain order numbers.

        Raises:
            DataError: No event is left.
        """
        report = ReadReport() if report is None else report
        grouped: dict[str, list[_Dated]] = {}
        for position, row in enumerate(events):
            event = row if isinstance(row, Event) else Event(*row, line=position + 1)
            user_id, item_id = as_id(event.user_id), as_id(event.item_id)
            item = None if item_id is None else items.index.get(item_id)
            order = position if event.order is IN_FILE_ORDER else as_timestamp(event.order, scale=scale_time)
            if user_id is None:
                kind, reason = "missing_user_id", f"no usable user id, got {shown(event.user_id)}"
            elif item_id is None:
                kind, reason = "missing_item_id", f"no usable item id, got {shown(event.item_id)}"
            elif item is None:
                kind, reason = "unknown_item", f"item {shown(item_id)} is not among the items"
            elif order is None:
                kind, reason = "bad_timestamp", f"{shown(event.order)} is not a point in time"
            else:
                grouped.setdefault(user_id, []).append((order, item, event.file, event.line))
                continue
            report.reject(kind, event.file, event.line, reason)
        if not grouped:
            raise DataError(
                f"{source} has no usable event: rows read {report.rows_read or 'none'}, rejected "
                f"{report.counts or 'none'}. Check that the files hold events and that their item ids are those of "
                "the items."
            )
        histories = tuple(_ordered(rows, report) for rows in grouped.values())
        report.note("items_without_title", sum("title" not in row for row in items.attributes))
        return cls(items, tuple(grouped), histories, report, source)

    @classmethod
    def from_histories(
        cls, items: ItemCatalog, histories: Mapping[str, Sequence[str]], source: str = "memory"
    ) -> "Interactions":
        """Build from each user's item ids, in time order already; an UnknownItemError names ids not in the catalog."""
        for item_ids in histories.values():
            items.indices_of(item_ids)
        events = (Event(user, item, IN_FILE_ORDER) for user, item_ids in histories.items() for item in item_ids)
        return cls.from_events(items, events, source=source)

    def sample_users(self, n: int, seed: int = 0) -> "Interactions":
        """Return a seeded cut of `n` users, or of all if there are fewer, in their present order over this catalog."""
        if n < 1:
            raise DataError(f"A cut needs at least one user, got n={n}.")
        if n >= len(self.user_ids):
            return self
        kept = sorted(random.Random(seed).sample(range(len(self.user_ids)), n))
        return replace(
            self,
            user_ids=tuple(self.user_ids[user] for user in kept),
            histories=tuple(self.histories[user] for user in kept),
            source=f"{self.source} ({n} of {len(self.user_ids)} users, seed {seed})",
        )

    def counts(self) -> dict[str, Any]:
        """Return the numbers that describe the data, as they go into `results.json`."""
        users, items, events = len(self.user_ids), len(self.items), self.num_events
        return {
            "source": self.source,
            "users": users,
            "items": items,
            "events": events,
            "average_length": events / users if users else 0.0,
            "density": events / (users * items) if users and items else 0.0,
            **self.report.to_dict(),
        }


def _ordered(rows: list[_Dated], report: ReadReport) -> tuple[int, ...]:
    """Order one user's events in time (the sort is stable, so ties keep file order) and reject exact duplicates."""
    history: dict[tuple[float, int], int] = {}
    for order, item, file, line in sorted(rows, key=lambda row: row[0]):
        if (order, item) in history:
            report.reject("duplicate_event", file, line, "the user has this item at this time already")
        history[order, item] = item
    return tuple(history.values())
