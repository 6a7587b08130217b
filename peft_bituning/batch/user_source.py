"""Users and their histories, read in blocks of consecutive rows from parquet files or `datasets`."""

import bisect
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # what `datasets` reads and writes parquet with
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset

from ..data.values import as_id, shown
from ..errors import ConfigurationError, DataError

Files = str | Path | Sequence[str | Path]
Read = Callable[[], list[dict[str, Any]]]  # gives the rows of a block

_READ_AHEAD = 2**20  # bytes of a column read at once


@dataclass(frozen=True)
class UserBlock:
    """Consecutive rows of a source, read when `users` is called.

    Args:
        number: its place among the blocks, from 0.
        first: the source's row that it starts with, from 0.
        rows: how many it holds.
        users: reads and checks them: user ids, and item ids in time order, one list a user.
    """

    number: int
    first: int
    rows: int
    users: Callable[[], tuple[list[str], list[list[str]]]]


class UserSource:
    """One row a user: an id and a list of item ids in time order; the same rows in the same order every time.

    Args:
        source: parquet files (a path, a glob, a folder, or a list of them), a `Dataset`, or an `IterableDataset`.
        user_column: column of the user id.
        history_column: column of the item ids.

    Raises:
        ConfigurationError: another kind of source, or a column that is not there.
        DataError: no such file, or a file that is not parquet.
    """

    def __init__(
        self,
        source: Files | Dataset | IterableDataset,
        user_column: str = "user_id",
        history_column: str = "history",
    ) -> None:
        self.columns = (user_column, history_column)
        self._table: ParquetTable | DatasetTable
        self._searched: list[Path] = []
        if isinstance(source, Dataset | IterableDataset):
            self._table = DatasetTable(source, self.columns)
        elif _is_paths(given := [source] if isinstance(source, str | Path) else source):
            self._searched = [Path(path).expanduser().absolute() for path in given if Path(path).expanduser().is_dir()]
            self._table = ParquetTable(find_files(given), self.columns)
        else:
            raise ConfigurationError(
                f"source must be parquet files, a datasets.Dataset or an IterableDataset, got {type(source).__name__}; "
                "of a DatasetDict give one split"
            )
        self.rows = self._table.rows

    @property
    def description(self) -> dict[str, Any]:
        """What is known of the source before it is read, as JSON values."""
        return self._table.description

    def overlaps(self, folder: Path) -> bool:
        """Say whether a folder holds files of the source, or lies in a folder that is searched for them."""
        folder = folder.absolute()
        files = self._table.paths if isinstance(self._table, ParquetTable) else ()
        return any(file.absolute().is_relative_to(folder) for file in files) or any(
            folder.is_relative_to(searched) for searched in self._searched
        )

    def blocks(self, size: int) -> Iterator[UserBlock]:
        """Read all rows, a block at a time; only the last can be shorter.

        Args:
            size: rows a block.

        Yields:
            The blocks in order. What nobody asks the `users` of is not turned into Python objects.

        Raises:
            DataError: a file that is damaged; from `users`, a row that is no user, by its place.
        """
        first = 0
        for number, (rows, read) in enumerate(self._table.blocks(size)):
            yield UserBlock(number, first, rows, partial(self._users, first, read))
            first += rows

    def place(self, row: int) -> str:
        """Say where a row is, for messages."""
        return f"row {self._table.place(row)} (the first is 0)"

    def _users(self, first: int, read: Read) -> tuple[list[str], list[list[str]]]:
        user_column, history_column = self.columns
        users, histories = [], []
        for row, values in enumerate(read(), start=first):
            if user_column not in values or history_column not in values:
                _check_columns(self.columns, values, self.place(row))
            given = values[user_column]
            user = as_id(given)
            if user is None:
                raise DataError(f"{user_column} must be an id, got {given!r} in {self.place(row)}; give every user one")
            users.append(user)
            histories.append(self._history(values[history_column], row))
        return users, histories

    def _history(self, history: Any, row: int) -> list[str]:
        if getattr(history, "ndim", 0) == 1:
            history = history.tolist()
        rule = f"{self.columns[1]} must be a list of item ids"
        if not isinstance(history, list | tuple):
            raise DataError(f"{rule}, got {shown(history)} in {self.place(row)}; write [] for a user without purchases")
        items: list[str] = []
        for item in history:
            known = as_id(item)
            if known is None:
                raise DataError(f"{rule}, got {shown(item)} as one of them in {self.place(row)}; leave it out")
            items.append(known)
        return items


class ParquetTable:
    """Parquet files one after the other.

    They are read page by page: `datasets` decodes a row group, by default a million rows, at once.

    Args:
        paths: the files.
        columns: names of the columns of users and of histories.
    """

    def __init__(self, paths: tuple[Path, ...], columns: tuple[str, str]) -> None:
        self.paths = paths
        self.columns = list(dict.fromkeys(columns))
        counts = []
        for path in paths:
            with _reading(path), pq.ParquetFile(path) as file:
                _check_columns(columns, file.schema_arrow.names, path.name)
                counts.append(file.metadata.num_rows)
        self.starts = [0, *accumulate(counts)]
        self.rows: int | None = self.starts[-1]
        root = os.path.commonpath([path.absolute().parent for path in paths])
        self.description: dict[str, Any] = {
            "files": {
                os.path.relpath(path.absolute(), root): {"bytes": path.stat().st_size, "rows": count}
                for path, count in zip(paths, counts, strict=True)
            },
            "rows": self.rows,
        }

    def blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        """Yield the number of rows of each block of `size` rows, the last one maybe shorter, and how to read it."""
        held: list[pa.RecordBatch] = []
        count = 0
        for batch in self._batches(size):
            while batch.num_rows:
                held.append(batch.slice(0, size - count))
                count += held[-1].num_rows
                batch = batch.slice(held[-1].num_rows)
                if count == size:
                    yield count, partial(_rows, held)
                    held, count = [], 0
        if count:
            yield count, partial(_rows, held)

    def place(self, row: int) -> str:
        """Say where a row is, for messages."""
        file = bisect.bisect_right(self.starts, row) - 1
        return f"{row - self.starts[file]} of {self.paths[file].name}"

    def _batches(self, size: int) -> Iterator[pa.RecordBatch]:
        for path in self.paths:
            with _reading(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD) as file:
                yield from file.iter_batches(batch_size=size, columns=self.columns)


class DatasetTable:
    """A `Dataset`, whose rows are read where they lie, or an `IterableDataset`, which is never read ahead of the block.

    Args:
        dataset: one split.
        columns: names of the columns of users and of histories.
    """

    def __init__(self, dataset: Dataset | IterableDataset, columns: tuple[str, str]) -> None:
        self.name = f"the {type(dataset).__name__}"
        if dataset.features is not None:
            _check_columns(columns, dataset.features, self.name)
        self.columns = list(dict.fromkeys(columns))
        self.dataset = dataset
        self.rows = len(dataset) if isinstance(dataset, Dataset) else None
        self.description: dict[str, Any] = {"rows": self.rows}

    def blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        """See `ParquetTable`."""
        if isinstance(self.dataset, Dataset):
            for table in self.dataset.select_columns(self.columns).with_format("arrow").iter(size):
                yield table.num_rows, table.to_pylist
            return
        rows = iter(self.dataset.with_format(None))
        while block := list(islice(rows, size)):
            yield len(block), partial(list, block)

    def place(self, row: int) -> str:
        """See `ParquetTable`."""
        return f"{row} of {self.name}"


def block_digest(users: Sequence[str], histories: Sequence[Sequence[str]]) -> str:
    """Return the sha256 of a block's content, the same whatever kind of source it came from."""
    return hashlib.sha256(json.dumps([users, histories]).encode()).hexdigest()


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
        else:
            files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
            files = [path] if path.is_file() else files
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


def _is_paths(source: object) -> bool:
    return isinstance(source, list | tuple) and all(isinstance(each, str | Path) for each in source)


def _rows(batches: list[pa.RecordBatch]) -> list[dict[str, Any]]:
    return [row for batch in batches for row in batch.to_pylist()]


def _check_columns(columns: tuple[str, str], present: Iterable[str], where: str) -> None:
    for argument, name in zip(("user_column", "history_column"), columns, strict=True):
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
            f"{path} must be a parquet file, got one that cannot be read ({shown(str(error))}); it is damaged, "
            "incomplete or of another kind"
        ) from error
