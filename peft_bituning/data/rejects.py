"""Rows of sources: those that could not be used are counted by kind, named by file and line, written to a file."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..artifacts import write_whole
from ..errors import DataError

logger = logging.getLogger(__name__)

#: Kinds that never stop a run: the row adds nothing that an earlier row has not said already.
HARMLESS_KINDS = frozenset({"duplicate_event", "duplicate_item"})

#: Share of the rows of one file that may be rejected before reading stops.
DEFAULT_MAX_REJECTED = 0.05


class Row(NamedTuple):
    """One record of a file."""

    file: str  # its base name
    line: int  # from 1; the header counts as a line
    record: Mapping[str, Any]  # column to value


@dataclass(frozen=True)
class RejectedRow:
    """One row that was left out: the kind of fault (see `ReadReport`), where it stood, and one sentence why."""

    kind: str
    file: str
    line: int
    reason: str


@dataclass
class ReadReport:
    """What reading a source met: rows read, rows rejected and why, and things worth knowing.

    Kinds of rejected rows: `missing_user_id`, `missing_item_id`, `unknown_item`, `bad_timestamp`, `broken_json`,
    `broken_row` (CSV quotes), `wrong_column_count`, `bad_encoding`, `conflicting_item` (an id again, with other
    text), `inconsistent_history`, and the two harmless ones, `duplicate_event` and `duplicate_item`.

    Args:
        rows_read: Rows (not headers, not blank lines) per file base name.
        rejected: The rejected rows in the order they were met.
        notes: Counts of things that reject nothing (`missing_title`, `below_five_core`, ...).
    """

    rows_read: dict[str, int] = field(default_factory=dict)
    rejected: list[RejectedRow] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def add_row(self, file: str) -> None:
        """Count one row of `file` as read."""
        self.rows_read[file] = self.rows_read.get(file, 0) + 1

    def reject(self, kind: str, file: str, line: int, reason: str) -> None:
        """Leave one row out, for a reason."""
        self.rejected.append(RejectedRow(kind, file, line, reason))

    def note(self, name: str, amount: int = 1) -> None:
        """Count something worth knowing that rejects no row."""
        if amount:
            self.notes[name] = self.notes.get(name, 0) + amount

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by kind, most frequent first."""
        return dict(Counter(row.kind for row in self.rejected).most_common())

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts alone, as they go into `results.json`."""
        return {"rows_read": dict(self.rows_read), "rejected": self.counts, "notes": dict(self.notes)}

    def write(self, path: str | Path) -> Path:
        """Write the rejected rows as JSON lines into a file, whose folder is made if needed; return its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, "".join(json.dumps(asdict(row)) + "\n" for row in self.rejected))
        return target

    def check(self, threshold: float = DEFAULT_MAX_REJECTED, rejects_path: str | Path | None = None) -> None:
        """Raise a DataError when more than a share `threshold` of the rows of a file was rejected.

        The share is taken per file, so that a long file of items cannot hide a broken file of events. Exact
        duplicates (`HARMLESS_KINDS`) are counted and written like all others, but do not stop a run by themselves.
        The message names `rejects_path`, where the rows were written.
        """
        harmful = [row for row in self.rejected if row.kind not in HARMLESS_KINDS]
        for file in dict.fromkeys(row.file for row in harmful):
            found = [row for row in harmful if row.file == file]
            number, rows = len(found), max(self.rows_read.get(file, 0), len(found))
            if number <= threshold * rows:
                continue
            kinds = Counter(row.kind for row in found).most_common()
            listed = f"All are listed in {rejects_path}." if rejects_path else "Pass rejects_path= to list them all."
            raise DataError(
                f"{number} of {rows} rows of {file} were rejected ({number / rows:.1%}, at most {threshold:.1%} "
                f"allowed): {', '.join(f'{count} {kind}' for kind, count in kinds)}. First: line {found[0].line}, "
                f"{found[0].reason}. {listed} Correct the rows, or raise max_rejected to go on without them."
            )


@contextmanager
def settled_report(
    rejects_path: str | Path | None = None, max_rejected: float = DEFAULT_MAX_REJECTED
) -> Iterator[ReadReport]:
    """Give a report to read into; write its rejects file and check its threshold when reading ends.

    The rejects file is written even when reading fails, so that the cause can be looked up. A DataError says that
    `max_rejected` is not a share, or that more rows of one file were rejected.
    """
    if not 0.0 <= max_rejected <= 1.0:
        raise DataError(f"max_rejected must be a share from 0 to 1, got {max_rejected!r}.")
    report = ReadReport()
    try:
        yield report
    finally:
        if rejects_path is not None:
            report.write(rejects_path)
        if report.rejected:
            listed = "pass rejects_path= to list them" if rejects_path is None else f"listed in {rejects_path}"
            logger.warning("Rejected rows by kind: %s (%s).", report.counts, listed)
        if report.notes:
            logger.info("Notes from reading: %s.", report.notes)
    report.check(max_rejected, rejects_path)
