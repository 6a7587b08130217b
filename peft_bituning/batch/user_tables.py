"""The kinds of tables that users come in: parquet files, a `Dataset`, an `IterableDataset`."""

import bisect
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa  # what `datasets` reads and writes parquet with
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset

from ..errors import ConfigurationError, DataError

Files = str | Path | Sequence[str | Path]
Read = Callable[[], tuple[Sequence[Any], Sequence[Any]]]  # gives the two columns of a block

_READ_AHEAD = 2**20  # bytes of a column read at once


class UserTable(Protocol):
    """What every kind of table can do.

    Args:
        rows: how many there are, where that is known before reading.
        description: what is known of the table before reading, as JSON values.
    """

    rows: int | None
    description: dict[str, Any]

    def blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        """Yield the number of rows of each block of `size` rows, the last one maybe shorter, and how to read it."""

    def place(self, row: int) -> str:
        """Say where a row is, for messages."""


class ParquetTable:
    """Parquet files one after the other.

    They are read page by page: `datasets` decodes a row group, by default a million rows, at once.

    Args:
        paths: the files.
        columns: names of the two columns, by the argument that gave them.
    """

    def __init__(self, paths: tuple[Path, ...], columns: dict[str, str]) -> None:
        self.paths = paths
        self.names = list(dict.fromkeys(columns.values()))
        counts = []
        for path in paths:
            with _reading(path), pq.ParquetFile(path) as file:
                _check_columns(columns, file.schema_arrow.names, path.name)
                counts.append(file.metadata.num_rows)
        self.columns = tuple(columns.values())
        self.starts = [0, *accumulate(counts)]
        self.rows: int | None = self.starts[-1]
        root = os.path.commonpath([path.absolute().parent for path in paths])
        self.description = {
            "files": {
                os.path.relpath(path.absolute(), root): {"bytes": path.stat().st_size, "rows": count}
                for path, count in zip(paths, counts, strict=True)
            },
            "rows": self.rows,
        }

    def blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        """See `UserTable`."""
        held: list[pa.RecordBatch] = []
        count = 0
        for batch in self._batches(size):
            while batch.num_rows:
                held.append(batch.slice(0, size - count))
                count += held[-1].num_rows
                batch = batch.slice(held[-1].num_rows)
                if count == size:
                    yield count, partial(self._values, held)
                    held, count = [], 0
        if count:
            yield count, partial(self._values, held)

    def _batches(self, size: int) -> Iterator[pa.RecordBatch]:
        for path in self.paths:
            with _reading(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD) as file:
                yield from file.iter_batches(batch_size=size, columns=self.names)

    def _values(self, batches: list[pa.RecordBatch]) -> tuple[Sequence[Any], Sequence[Any]]:
        users, histories = (
            [value for batch in batches for value in batch.column(name).to_pylist()] for name in self.columns
        )
        return users, histories

    def place(self, row: int) -> str:
        """See `UserTable`."""
        file = bisect.bisect_right(self.starts, row) - 1
        return f"row {row - self.starts[file]} of {self.paths[file].name} (the first is 0)"


class DatasetTable:
    """A `Dataset`: rows are read where they lie.

    Args:
        dataset: one split.
        columns: names of the two columns, by the argument that gave them.
    """

    def __init__(self, dataset: Dataset, columns: dict[str, str]) -> None:
        _check_columns(columns, dataset.column_names, "the Dataset")
        self.columns = tuple(columns.values())
        self.dataset = dataset.select_columns(list(dict.fromkeys(self.columns))).with_format(None)
        self.rows: int | None = len(dataset)
        self.description: dict[str, Any] = {"rows": self.rows}

    def blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        """See `UserTable`."""
        for first in range(0, len(self.dataset), size):
            last = min(first + size, len(self.dataset))
            yield last - first, partial(self._values, first, last)

    def _values(self, first: int, last: int) -> tuple[Sequence[Any], Sequence[Any]]:
        rows = self.dataset[first:last]
        return rows[self.columns[0]], rows[self.columns[1]]

    def place(self, row: int) -> str:
        """See `UserTable`."""
        return f"row {row} of the Dataset (the first is 0)"


class StreamedTable:
    """An `IterableDataset`: rows are read as it gives them, never ahead of the block.

    Args:
        dataset: one split.
        columns: names of the two columns, by the argument that gave them.
    """

    def __init__(self, dataset: IterableDataset, columns: dict[str, str]) -> None:
        if dataset.features is not None:
            _check_columns(columns, list(dataset.features), "the IterableDataset")
        self.columns = columns
        self.dataset = dataset.with_format(None)
        self.rows: int | None = None
        self.description: dict[str, Any] = {"rows": None}

    def blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        """See `UserTable`."""
        rows = iter(self.dataset)
        first = 0
        while block := list(islice(rows, size)):
            yield len(block), partial(self._values, first, block)
            first += len(block)

    def _values(self, first: int, block: list[dict[str, Any]]) -> tuple[Sequence[Any], Sequence[Any]]:
        for row, values in enumerate(block, start=first):
            _check_columns(self.columns, list(values), self.place(row))
        users, histories = ([values[name] for values in block] for name in self.columns.values())
        return users, histories

    def place(self, row: int) -> str:
        """See `UserTable`."""
        return f"row {row} of the IterableDataset (the first is 0)"


def find_files(source: Sequence[str | Path]) -> tuple[Path, ...]:
    """Find parquet files.

    Args:
        source: paths, globs, and folders, which are searched through except for hidden ones.

    Returns:
        The files; those of a glob or a folder sorted by name.

    Raises:
        DataError: there are none.
    """
    found: list[Path] = []
    for each in source:
        path = Path(each).expanduser()
        if path.is_dir():
            files = [file for file in path.rglob("*.parquet") if not _is_hidden(file.relative_to(path))]
        elif path.is_file():
            files = [path]
        else:
            files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not files:
            raise DataError(
                f"source must name parquet files, got {str(each)!r}, where there are none; check the path, and give "
                "what lies elsewhere as datasets.load_dataset(..., streaming=True)"
            )
        found.extend(sorted(files))
    if not found:
        raise DataError("source must name parquet files, got an empty list; give a path, a glob or a folder")
    return tuple(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _check_columns(columns: dict[str, str], present: Sequence[str], where: str) -> None:
    for argument, name in columns.items():
        if name not in present:
            raise ConfigurationError(
                f"{argument} must be a column of {where} ({', '.join(present) or 'it has none'}), got {name!r}; give "
                f"its name as {argument}"
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} must be a parquet file, got one that cannot be read ({short(str(error))}); it is damaged, "
            "incomplete or of another kind"
        ) from error


def short(value: object) -> str:
    """Return a value as a message can show it."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
